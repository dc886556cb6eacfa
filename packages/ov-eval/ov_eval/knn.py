"""k-nearest-neighbour classification of frozen features, and the majority baseline."""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ov_eval.generative import Classification


def knn(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  *,
  k: int = 20,
  temperature: float = 0.07,
  num_classes: int | None = None,
  chunk: int = 4096,
) -> Classification:
  """Classify each test row by its `k` nearest training rows (arXiv 1805.01978, as in DINO).

  Similarity is the cosine; a neighbour votes for its class with weight
  exp(similarity / temperature). Ties between rows are broken by the order of `train`, ties between
  classes by class number. A true class without votes ranks last, so that a small k does not inflate
  top-5.

  Args:
    train, test: features float [N, E] and [M, E], valid rows only. Either every process passes all
      rows, or each passes a shard of the test rows and merges the results with `across_processes`.
    train_labels, test_labels: labels int [N] and [M].
    k: number of neighbours, clipped to N.
    temperature: temperature of the votes; with Inf all neighbours have equal weight.
    num_classes: number of classes; largest label + 1 by default.
    chunk: number of rows compared at a time; the device holds `test`, chunk rows of `train` and
      chunk x chunk similarities.

  Raises:
    ValueError: if shapes do not match, a feature is NaN or Inf, a label is out of range, or another
      argument is out of range.
  """
  train, train_labels, num_classes = check_features(
    train, train_labels, test, test_labels, num_classes
  )
  test, test_labels = np.asarray(test, np.float32), np.asarray(test_labels, np.int64)
  if k < 1 or chunk < 1 or not temperature > 0:
    raise ValueError(f"k={k} and chunk={chunk} must be >= 1, temperature={temperature} > 0.")
  k, chunk = min(k, len(train)), min(chunk, max(len(train), len(test)))
  state = Classification.of(np.zeros((0, num_classes)), np.zeros(0, int), np.zeros(0, bool))
  for start, (similarity, index) in enumerate(_nearest(train, test, k, chunk)):
    labels = test_labels[start * chunk :][:chunk]
    rows = np.arange(len(labels))
    votes = np.exp((similarity - similarity[:, :1]) / temperature)
    scores = np.zeros((len(labels), num_classes))
    np.add.at(scores, (rows[:, None], train_labels[index]), votes)
    own = scores[rows, labels]
    scores[rows, labels] = np.where(own > 0, own, -np.inf)
    state += Classification.of(scores, labels, np.ones(len(labels), bool))
  return state


def majority(
  train_labels: np.ndarray, test_labels: np.ndarray, *, num_classes: int | None = None
) -> Classification:
  """Return the majority baseline, which ranks classes by their frequency in the training labels.

  Args:
    train_labels, test_labels: labels int [N] and [M].
    num_classes: number of classes; largest label + 1 by default.
  """
  rows = np.zeros((len(train_labels), 1)), np.zeros((len(test_labels), 1))
  _, labels, num_classes = check_features(rows[0], train_labels, rows[1], test_labels, num_classes)
  counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
  scores = np.broadcast_to(counts, (len(test_labels), num_classes))
  return Classification.of(scores, test_labels, np.ones(len(test_labels), bool))


def check_features(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  num_classes: int | None,
) -> tuple[np.ndarray, np.ndarray, int]:
  """Check the arguments common to all classifiers of features.

  Returns:
    The training features float32 [N, E], their labels int64 [N], and the number of classes.

  Raises:
    ValueError: if shapes do not match, a feature is NaN or Inf, or a label is out of range.
  """
  for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
    shape, size = np.shape(rows), np.shape(labels)
    if len(shape) != 2 or size != shape[:1]:
      raise ValueError(f"{name} features {shape} and labels {size} must be [N, E] and [N].")
    if not shape[0]:
      raise ValueError(f"there are no {name} rows; check the split.")
    if not np.issubdtype(np.asarray(labels).dtype, np.integer):
      raise ValueError(f"{name} labels are {np.asarray(labels).dtype}, expected class numbers.")
    bad = int((~np.isfinite(rows).all(1)).sum())
    if bad:
      raise ValueError(f"{bad} {name} rows have NaN or Inf features; check the model.")
  if np.shape(train)[1] != np.shape(test)[1]:
    raise ValueError(
      f"train has {np.shape(train)[1]} features and test {np.shape(test)[1]}; use one model."
    )
  largest = int(max(np.max(train_labels), np.max(test_labels)))
  lowest = int(min(np.min(train_labels), np.min(test_labels)))
  num_classes = largest + 1 if num_classes is None else num_classes
  if lowest < 0 or largest >= num_classes:
    wrong = lowest if lowest < 0 else largest
    raise ValueError(f"label {wrong} is not in [0, {num_classes}); remove such rows.")
  return np.asarray(train, np.float32), np.asarray(train_labels, np.int64), num_classes


def _nearest(
  train: np.ndarray, test: np.ndarray, k: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yield the k most similar training rows per chunk of test rows: float64 [B, k], int [B, k]."""
  queries = [jnp.asarray(_unit(test[i : i + chunk], chunk)) for i in range(0, len(test), chunk)]
  none = np.full((chunk, k), -np.inf, np.float32), np.zeros((chunk, k), np.int32)
  best = [(jnp.asarray(none[0]), jnp.asarray(none[1])) for _ in queries]
  for start in range(0, len(train), chunk):
    part = train[start : start + chunk]
    block, count = jnp.asarray(_unit(part, chunk)), np.int32(len(part))
    best = [
      _merge(*kept, rows, block, np.int32(start), count)
      for kept, rows in zip(best, queries, strict=True)
    ]
  for i, kept in enumerate(best):
    size = len(test[i * chunk : (i + 1) * chunk])
    similarity, index = jax.device_get(kept)
    yield similarity[:size].astype(np.float64), index[:size]


def _unit(rows: np.ndarray, size: int) -> np.ndarray:
  """Return unit vectors, zero-padded to `size` rows."""
  filled = np.zeros((size, rows.shape[1]), np.float32)
  filled[: len(rows)] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8)
  return filled


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _merge(
  best: jax.Array,
  index: jax.Array,
  queries: jax.Array,
  block: jax.Array,
  start: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Merge `best` and `index` [B, k] with the first `count` rows of a block."""
  similarity = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
  column = jnp.arange(block.shape[0], dtype=jnp.int32)
  similarity = jnp.where(column < count, similarity, -jnp.inf)
  # top_k prefers earlier columns in a tie, so earlier rows come first.
  values = jnp.concatenate([best, similarity], axis=1)
  rows = jnp.broadcast_to(start + column, similarity.shape)
  best, position = jax.lax.top_k(values, best.shape[1])
  return best, jnp.take_along_axis(jnp.concatenate([index, rows], axis=1), position, axis=1)
