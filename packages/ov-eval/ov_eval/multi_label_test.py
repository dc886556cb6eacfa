"""Tests of average precision against its definition and scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from ov_eval.multi_label import average_precision


def _naive(scores, targets):
  """Return the average precision of one class by its definition."""
  order = sorted(range(len(scores)), key=lambda i: -scores[i])
  precisions, hits = [], 0
  for rank, i in enumerate(order, 1):
    if targets[i]:
      hits += 1
      precisions.append(hits / rank)
  return sum(precisions) / max(len(precisions), 1)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition_and_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  targets = rng.random((80, 6)) < 0.3
  scores = rng.normal(size=(80, 6)) + targets
  found = average_precision(scores, targets)
  expected = [_naive(scores[:, c], targets[:, c]) for c in range(6)]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
  theirs = metrics.average_precision_score(targets, scores, average=None)
  np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-14)


def test_ties_rank_in_stored_order_and_an_empty_class_has_0():
  scores = np.ones((4, 2))
  targets = np.array([[0, 0], [1, 0], [0, 0], [1, 0]])
  np.testing.assert_allclose(average_precision(scores, targets), [(1 / 2 + 2 / 4) / 2, 0])
  np.testing.assert_allclose(average_precision(scores, targets[::-1]), [(1 + 2 / 3) / 2, 0])


def test_errors():
  with pytest.raises(ValueError, match=r"scores \(3, 2\) and targets \(3,\)"):
    average_precision(np.zeros((3, 2)), np.zeros(3))
  with pytest.raises(ValueError, match="1 images have NaN class scores"):
    average_precision(np.array([[np.nan, 0], [0, 0]]), np.zeros((2, 2)))
