"""Tests of classification metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from ov_eval.generative import Classification
from ov_eval.states import Confusion
from ov_eval.zero_shot import classify_by_embedding

NUM_CLASSES, SIZE = 9, 400


def _assert_equal(state, true, shown):
  """Assert that the metrics of a state equal those of scikit-learn."""
  guess = shown.argmax(1)
  assert state.top1.value == pytest.approx(metrics.accuracy_score(true, guess), abs=1e-15)
  # scikit-learn breaks ties by the higher class number, ov_eval by the lower: reverse the classes.
  top5 = metrics.top_k_accuracy_score(
    NUM_CLASSES - 1 - true, shown[:, ::-1], k=5, labels=range(NUM_CLASSES)
  )
  assert state.top5.value == pytest.approx(top5, abs=1e-15)
  expected = metrics.confusion_matrix(true, guess, labels=range(NUM_CLASSES))
  np.testing.assert_array_equal(state.confusion.counts, expected)
  recalls = metrics.recall_score(true, guess, average=None, labels=range(NUM_CLASSES))
  per_class = [share.value for share in state.confusion.per_class()]
  np.testing.assert_allclose(per_class, recalls, rtol=0, atol=1e-15)
  mean = metrics.balanced_accuracy_score(true, guess)
  assert state.confusion.mean_per_class() == pytest.approx(mean, abs=1e-15)
  f1 = metrics.f1_score(true, guess, average="macro", labels=np.unique(true))
  assert state.confusion.macro_f1() == pytest.approx(f1, abs=1e-15)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_classification_equals_scikit_learn(seed, ties):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, NUM_CLASSES, SIZE)
  scores = rng.normal(size=(SIZE, NUM_CLASSES)) + 1.5 * np.eye(NUM_CLASSES)[labels]
  if ties:
    scores = np.round(scores)
    assert np.mean([len(set(row)) < NUM_CLASSES for row in scores.tolist()]) > 0.9
  valid = rng.random(SIZE) < 0.8
  state = Classification.of(scores[:150], labels[:150], valid[:150])
  state += Classification.of(scores[150:], labels[150:], valid[150:])
  _assert_equal(state, labels[valid], scores[valid])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_zero_shot_by_embedding_equals_scikit_learn(seed, ties):
  rng = np.random.default_rng(seed)
  matrix = rng.normal(size=(NUM_CLASSES, 16))
  labels = rng.integers(0, NUM_CLASSES, SIZE)
  vectors = matrix[labels] + 2.5 * rng.normal(size=(SIZE, 16))
  if ties:  # integers, whose dot products are exact in any order
    matrix, vectors = np.round(matrix), np.round(vectors)
  matrix, vectors = matrix.astype(np.float32), vectors.astype(np.float32)
  rows = np.append(rng.permutation(SIZE), rng.integers(0, SIZE, 30))  # 30 repeats
  batches = [
    {"vector": vectors[r], "label": labels[r], "index": r, "valid": np.ones(len(r), bool)}
    for r in np.array_split(rows, 13)
  ]
  state, _ = classify_by_embedding(lambda batch: batch["vector"], matrix, batches)
  scores = (vectors.astype(np.float64) @ matrix.astype(np.float64).T).astype(np.float32)
  assert ties == (np.mean([len(set(row)) < NUM_CLASSES for row in scores.tolist()]) > 0.2)
  assert 0.2 < state.top1.value < 0.95
  _assert_equal(state, labels, scores)


def test_mean_per_class_excludes_classes_without_examples():
  true, guess = np.array([0, 0, 2, 2, 2]), np.array([0, 1, 2, 2, 0])
  ours = Confusion.of(true, guess, 4).mean_per_class()
  assert ours == pytest.approx(metrics.recall_score(true, guess, average="macro", labels=[0, 2]))
