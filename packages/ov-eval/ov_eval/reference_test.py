"""The figures of classification against an independent implementation."""

import numpy as np
import pytest
from sklearn import metrics

from ov_eval.generative import Classification


@pytest.mark.parametrize("seed", range(3))
def test_classification_equals_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  num_classes, size = 9, 400
  labels = rng.integers(0, num_classes, size)
  scores = rng.normal(size=(size, num_classes)) + 1.5 * np.eye(num_classes)[labels]
  valid = rng.random(size) < 0.8
  state = Classification.of(scores[:150], labels[:150], valid[:150])
  state += Classification.of(scores[150:], labels[150:], valid[150:])

  true, shown = labels[valid], scores[valid]
  guess = shown.argmax(1)
  classes = range(num_classes)
  assert state.top1.value == pytest.approx(metrics.accuracy_score(true, guess))
  top5 = metrics.top_k_accuracy_score(true, shown, k=5, labels=classes)
  assert state.top5.value == pytest.approx(top5)
  expected = metrics.confusion_matrix(true, guess, labels=classes)
  np.testing.assert_array_equal(state.confusion.counts, expected)
  recall = metrics.recall_score(true, guess, average="macro")
  assert state.confusion.mean_per_class() == pytest.approx(recall)
