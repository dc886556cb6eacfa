import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from ov_eval.knn import knn, majority
from ov_eval.states import Share


def _clusters(seed, size, num_classes=7, width=12):
  centres = np.random.default_rng(99).normal(size=(num_classes, width))
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, num_classes, size)
  rows = centres[labels] + 1.3 * rng.normal(size=(size, width))
  return (rows * rng.uniform(0.1, 9, (size, 1))).astype(np.float32), labels


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.2), (9, np.inf)])
def test_equals_scikit_learn(k, temperature):
  (train, labels), (test, truth) = _clusters(0, 301), _clusters(1, 157)
  found = knn(train, labels, test, truth, k=k, temperature=temperature, chunk=64)
  reference = KNeighborsClassifier(
    k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
  ).fit(_unit(train.astype(np.float64)), labels)
  guess = reference.predict(_unit(test.astype(np.float64)))
  assert found.top1 == Share.of(guess == truth)
  np.testing.assert_array_equal(found.confusion.counts.sum(0), np.bincount(guess, minlength=7))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunk_size_does_not_change_the_result(chunk):
  # Small integers: every product is exact, so ties are preserved for all chunk sizes.
  rng = np.random.default_rng(2)
  train, test = (rng.integers(0, 2, (size, 4)) * 2 - 1 for size in (60, 33))
  labels, truth = rng.integers(0, 5, 60), rng.integers(0, 5, 33)
  whole = knn(train, labels, test, truth, k=6)
  parts = knn(train, labels, test, truth, k=6, chunk=chunk)
  assert (parts.top1, parts.top5) == (whole.top1, whole.top5)
  np.testing.assert_array_equal(parts.confusion.counts, whole.confusion.counts)


def test_ties():
  train = np.ones((6, 2))  # duplicates, so all are tied
  test = np.ones((1, 2))
  labels = np.array([3, 1, 1, 0, 0, 0])
  assert knn(train, labels, test, np.array([3]), k=1).top1.value == 1.0
  assert knn(train, labels, test, np.array([1]), k=3).top1.value == 1.0
  assert knn(train, labels, test, np.array([1]), k=2).top1.value == 1.0  # one vote each for 1 and 3
  assert knn(train, labels, test, np.array([0]), k=99).top1.value == 1.0  # k is clipped to 6


def test_duplicated_training_row_votes_twice():
  train = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
  labels, test, truth = np.array([0, 1, 2]), np.array([[1.0, 0.0]]), np.array([1])
  assert knn(train, labels, test, truth, k=2).top1.value == 0.0
  again = np.append(train, train[1:2], axis=0), np.append(labels, 1)
  assert knn(*again, test, truth, k=3).top1.value == 1.0


def test_class_without_votes_is_not_in_the_top_five():
  train, labels = np.eye(8), np.arange(8)
  test = np.array([[1.0] + [0.0] * 7])
  for truth, right in ((0, 1.0), (1, 0.0), (7, 0.0)):  # k = 1: only class 0 has a vote
    assert knn(train, labels, test, np.array([truth]), k=1).top5.value == right


def test_merging_parts_of_the_test_rows():
  (train, labels), (test, truth) = _clusters(0, 90), _clusters(1, 41)
  whole = knn(train, labels, test, truth)
  parts = [knn(train, labels, test[s], truth[s], num_classes=7) for s in (slice(20), slice(20, 41))]
  assert (parts[0] + parts[1]).top1 == whole.top1


def test_majority_is_the_most_frequent_training_class():
  found = majority(np.array([2, 2, 0, 1, 1]), np.array([1, 1, 2, 3]))
  assert found.top1.value == 0.5  # 1 and 2 are equally frequent: class 1
  assert found.top1.count == 4
  names = [result.name for result in found.results(prefix="majority")]
  assert names == ["majority_top1", "majority_top5", "majority_mean_per_class"]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"train": np.zeros((4, 2))}, "features"),
    ({"train": np.full((4, 3), np.nan)}, "4 train rows have NaN or Inf features"),
    ({"train_labels": np.zeros(3, int)}, r"\(4, 3\) and labels \(3,\)"),
    ({"train_labels": np.zeros(4)}, "float64"),
    ({"test_labels": np.array([0, -1])}, "label -1"),
    ({"num_classes": 1}, "label 1 is not in"),
    ({"test": np.zeros((0, 3)), "test_labels": np.zeros(0, int)}, "no test rows"),
    ({"k": 0}, "k=0"),
    ({"temperature": 0.0}, "temperature=0.0"),
  ],
)
def test_invalid_arguments(change, message):
  good = {
    "train": np.ones((4, 3)),
    "train_labels": np.array([0, 1, 1, 0]),
    "test": np.ones((2, 3)),
    "test_labels": np.array([0, 1]),
  }
  knn(**good)
  with pytest.raises(ValueError, match=message):
    knn(**{**good, **change})
