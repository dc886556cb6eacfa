import math

import chex
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from ov_eval.probe import L2, _hold_out, _Problem, few_shot, linear_probe


def _clusters(seed, size, num_classes=6, width=20, spread=2.0):
  centres = np.random.default_rng(99).normal(size=(num_classes, width))
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, num_classes, size)
  rows = centres[labels] + spread * rng.normal(size=(size, width))
  return (40 * rows + 7).astype(np.float32), labels


def _scaled(train, *others):
  mean = train.mean(0)
  scale = math.sqrt(np.square(train - mean).sum(1).mean())
  return [(rows - mean) / scale for rows in (train, *others)]


@pytest.mark.parametrize("l2", [0.3, 1e-2, 1e-4])
def test_one_fit_equals_scikit_learn(l2):
  (train, labels), (test, truth) = _clusters(0, 400), _clusters(1, 300)
  scaled, scaled_test = _scaled(train.astype(np.float64), test.astype(np.float64))
  reference = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8)
  reference.fit(scaled, labels)
  found = linear_probe(train, labels, test, truth, l2=(l2,))
  assert found.converged and found.l2 == l2 and found.validation == ()
  # Rounding may flip a test row on a decision boundary: 1 of 300.
  assert found.test.top1.value == pytest.approx(reference.score(scaled_test, truth), abs=1 / 299)

  problem = _Problem(train, labels, 6, 128)  # the last chunk is not full
  weights, _ = problem.fit(problem.zeros(), l2, 500)
  kernel = weights.reshape(21, 6)
  size = np.abs(reference.coef_).max()
  np.testing.assert_allclose(kernel[:-1], reference.coef_.T, atol=5e-3 * size)
  bias = kernel[-1] - kernel[-1].mean()  # only differences between classes matter
  np.testing.assert_allclose(bias, reference.intercept_ - reference.intercept_.mean(), atol=0.02)


def test_l2_is_selected_on_held_out_rows():
  (train, labels), (test, truth) = _clusters(0, 200, width=60), _clusters(1, 500, width=60)
  found = linear_probe(train, labels, test, truth)
  assert [l2 for l2, _ in found.validation] == sorted(L2, reverse=True)
  best = max(share.value for _, share in found.validation)
  assert found.l2 == next(l2 for l2, share in found.validation if share.value == best)
  assert found.validation[0][1].count == _hold_out(labels, 0.2, 0).sum()
  single = linear_probe(train, labels, test, truth, l2=(found.l2,))
  assert single.test.top1 == found.test.top1
  assert found.test.top1.value > linear_probe(train, labels, test, truth, l2=(1e3,)).test.top1.value


def test_explicit_validation_rows():
  (train, labels), (test, truth) = _clusters(0, 120, width=60), _clusters(1, 400, width=60)
  given = linear_probe(train[:90], labels[:90], test, truth, validation=(train[90:], labels[90:]))
  assert given.validation[0][1].count == 30
  # The final fit uses all 120 rows.
  single = linear_probe(train, labels, test, truth, l2=(given.l2,))
  assert single.test.top1 == given.test.top1


def test_duplicated_rows_do_not_change_the_fit():
  (train, labels), (test, truth) = _clusters(0, 150), _clusters(1, 200)
  once = linear_probe(train, labels, test, truth, l2=(1e-2,))
  twice = linear_probe(
    np.repeat(train, 2, 0), np.repeat(labels, 2), np.repeat(test, 2, 0), np.repeat(truth, 2),
    l2=(1e-2,),
  )  # fmt: skip
  assert twice.test.top1.value == once.test.top1.value


def test_iteration_limit_is_reported():
  train, labels = _clusters(0, 100)
  found = linear_probe(train, labels, train, labels, l2=(1e-6,), max_iterations=3)
  assert not found.converged and found.iterations == 3


def test_constant_features_give_the_majority():
  labels = np.array([0, 1, 1, 2])
  rows = np.full((4, 3), 5.0)
  found = linear_probe(rows, labels, rows, labels, l2=(1e-2,))
  np.testing.assert_array_equal(found.test.confusion.counts.sum(0), [0, 4, 0])


def test_held_out_rows_are_a_fraction_of_each_class():
  labels = np.repeat(np.arange(4), [1, 10, 50, 2])
  out = _hold_out(labels, 0.2, seed=3)
  assert np.bincount(labels[out], minlength=4).tolist() == [0, 2, 10, 0]
  assert (out == _hold_out(labels, 0.2, seed=3)).all()
  assert (out != _hold_out(labels, 0.2, seed=4)).any()
  with pytest.raises(ValueError, match="no class is large enough"):
    _hold_out(np.arange(4), 0.2, seed=0)


def test_few_shot_equals_probes_on_the_drawn_rows():
  (train, labels), (test, truth) = _clusters(0, 300), _clusters(1, 100)
  found = few_shot(train, labels, test, truth, shots=(1, 4, 16), draws=4)
  accuracy = found.accuracy()
  chex.assert_shape(accuracy, (3, 4))
  assert (np.diff(accuracy.mean(1)) > 0).all() and len(set(accuracy[0])) > 1
  again = few_shot(train, labels, test, truth, shots=(4,), draws=4)
  np.testing.assert_array_equal(again.accuracy(), accuracy[1:2])
  every = np.bincount(labels).min()
  same = few_shot(*_first(train, labels, every), test, truth, shots=(every,), draws=2)
  whole = linear_probe(*_first(train, labels, every), test, truth, l2=(1e-4,))
  np.testing.assert_allclose(same.accuracy()[0], whole.test.top1.value, atol=0.011)


def _first(rows, labels, count):
  keep = np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(6)])
  return rows[keep], labels[keep]


def test_few_shot_interval_includes_draws_and_test_rows():
  (train, labels), (test, truth) = _clusters(0, 300), _clusters(1, 100)
  found = few_shot(train, labels, test, truth, shots=(2,), draws=5)
  (result,) = found.results()
  assert result.name == "few_shot_2_top1" and result.count == 100
  draws = found.accuracy()[0]
  assert result.value == pytest.approx(draws.mean())
  over_draws = 2.776445 * draws.std(ddof=1) / math.sqrt(5)  # Student's t, 4 degrees of freedom
  share = np.mean(found.right[0], axis=0)
  over_rows = 1.959964 * share.std() / math.sqrt(100)
  assert result.high - result.value == pytest.approx(math.hypot(over_draws, over_rows), rel=1e-5)
  one = few_shot(train, labels, test, truth, shots=(2,), draws=1).results()[0]
  assert one.low < one.value < one.high


def test_invalid_arguments():
  train, labels = np.eye(6), np.array([0, 0, 0, 1, 1, 3])
  with pytest.raises(ValueError, match="at most 1: class 3 has no more"):
    few_shot(train, labels, train, labels, shots=(2,))
  with pytest.raises(ValueError, match="numbers > 0"):
    linear_probe(train, labels, train, labels, l2=(0.0,))
  with pytest.raises(ValueError, match="validation=1.5"):
    linear_probe(train, labels, train, labels, validation=1.5)
