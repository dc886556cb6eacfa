from fractions import Fraction
import math

import numpy as np
import pytest

from ov_eval.states import Confusion, Mean, Share


def _random_rows(seed, size=101):
  rng = np.random.default_rng(seed)
  weights = rng.integers(1, 40, size)
  return (rng.gamma(2.0, 3.0, size) * weights).astype(np.float32), weights


def test_mean_is_total_over_weight_and_ignores_padding():
  values, weights = _random_rows(0)
  valid = np.random.default_rng(1).random(len(values)) < 0.7
  state = Mean.of(np.where(valid, values, np.nan), weights, valid)
  expected = math.fsum(values[valid].tolist()) / weights[valid].sum()
  assert state.value == pytest.approx(expected, rel=1e-15)
  assert state.count == valid.sum()
  assert state.weight == weights[valid].sum()


def test_merging_is_exact_for_every_split_and_order():
  values, weights = _random_rows(2)
  whole = Mean.of(values, weights)
  rng = np.random.default_rng(3)
  for _ in range(5):
    cuts = np.sort(rng.integers(0, len(values), 6))
    order = rng.permutation(len(values))
    parts = [Mean.of(values[rows], weights[rows]) for rows in np.split(order, cuts)]
    merged = sum(parts, Mean())
    assert merged == whole  # sums are rational numbers, so merging is exact
    assert merged.interval() == whole.interval()


def test_float_sums_depend_on_the_order():
  values = np.array([1e16, 1.0, -1e16, 1.0])
  assert Mean.of(values).value == 0.5
  assert float(np.sum(values)) != 2.0


def test_sums_equal_sums_of_fractions():
  rng = np.random.default_rng(6)
  values = rng.standard_normal(1000) * 2.0 ** rng.integers(-500, 500, 1000)
  edges = [0.0, -0.0, 5e-324, -5e-324, 2.0**511, 1 - 2.0**-53, -1.0, np.finfo(float).tiny]
  values = np.concatenate([values, edges])
  state = Mean.of(values)
  assert state.total == sum(map(Fraction, values.tolist()))
  assert state.xx == sum(Fraction(x * x) for x in values.tolist())
  many = np.full(100_000, -(1 - 2.0**-53))  # their sum of mantissas overflows int64
  assert Mean.of(many).total == 100_000 * Fraction(many[0])
  with np.errstate(over="ignore"), pytest.raises(OverflowError, match="is inf in float64"):
    Mean.of([1.0, 1e200])


def test_interval_agrees_with_bootstrap_over_examples():
  values, weights = _random_rows(4, size=400)
  rng = np.random.default_rng(5)
  draws = rng.integers(0, len(values), (4000, len(values)))
  boot = values[draws].sum(1) / weights[draws].sum(1)
  low, high = Mean.of(values, weights).interval()
  # 4000 draws give the 2.5% quantile of a normal to about 0.04 standard errors (2 sigma: 0.08),
  # and the ratio is skewed a little; 0.15 standard errors is 4% of the interval's width.
  np.testing.assert_allclose([low, high], np.quantile(boot, [0.025, 0.975]), atol=0.15 * boot.std())


def test_empty_and_non_finite_states_have_no_value():
  assert math.isnan(Mean().value) and math.isnan(Mean().interval()[0])
  state = Mean.of([1.0, np.inf, 2.0]) + Mean.of([3.0])
  assert state.non_finite == 1 and state.count == 4
  assert math.isnan(state.value)


@pytest.mark.parametrize(
  "values, weights, valid",
  [([1.0, 2.0], [1.0], None), ([1.0], [-1.0], None), ([[1.0]], None, None), ([1.0], None, [1, 0])],
)
def test_invalid_rows(values, weights, valid):
  with pytest.raises(ValueError):
    Mean.of(values, weights, valid)


def test_share_of_single_trials_is_the_wilson_interval():
  # Wilson 1927 for 8 of 10 at 95%: (0.4902, 0.9433), the values of R's binom.confint.
  low, high = Share.of([1] * 8 + [0] * 2).interval()
  assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))


@pytest.mark.parametrize("hits", [0, 1])
def test_share_at_the_ends_keeps_an_interval(hits):
  low, high = Share.of([hits * 4] * 10, [4] * 10).interval()
  assert 0 <= low < high <= 1 and high - low == pytest.approx(0.2775, abs=1e-3)  # n = 10, not 40


def test_dependent_trials_widen_the_interval():
  together = Share.of([4] * 40 + [0] * 10, [4] * 50)
  apart = Share.of([1] * 160 + [0] * 40)
  assert together.value == apart.value
  width = np.diff(together.interval()) / np.diff(apart.interval())
  assert width == pytest.approx(2.0, rel=0.03)  # four equal trials count as one: sqrt(4)


def test_confusion_counts_and_recalls():
  rng = np.random.default_rng(6)
  labels, predicted = rng.integers(0, 5, (2, 200))
  labels[labels == 3] = 2
  state = Confusion.of(labels[:77], predicted[:77], 5) + Confusion.of(
    labels[77:], predicted[77:], 5
  )
  expected = [[int(((labels == i) & (predicted == j)).sum()) for j in range(5)] for i in range(5)]
  np.testing.assert_array_equal(state.counts, expected)
  recalls = [
    np.mean(predicted[labels == i] == i) if (labels == i).any() else np.nan for i in range(5)
  ]
  shares = state.per_class()
  np.testing.assert_allclose([share.value for share in shares], recalls)
  assert state.mean_per_class() == pytest.approx(np.nanmean(recalls))
  assert shares[2] == Share.of(predicted[labels == 2] == 2)
  true, guess, count = state.most_confused(1)[0]
  wrong = np.array(expected) - np.diag(np.diag(expected))
  assert count == wrong.max() == wrong[true, guess]
