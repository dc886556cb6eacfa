"""Linear probes of frozen features: multinomial logistic regression, full-data or few-shot."""

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # loads its modules at first use; together they take a second

from ov_eval.generative import Classification
from ov_eval.knn import check_features
from ov_eval.results import Result
from ov_eval.states import Mean, Share

L2 = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True)
class Probe:
  """Result of a linear probe.

  Attributes:
    test: metrics on the test rows.
    l2: regularisation strength with the best validation accuracy.
    validation: (l2, validation accuracy) of each strength, strongest first.
    iterations: number of iterations of the final fit.
    converged: False if the final fit stopped at `max_iterations`.
  """

  test: Classification
  l2: float
  validation: tuple[tuple[float, Share], ...]
  iterations: int
  converged: bool

  def results(self, level: float = 0.95, prefix: str = "probe") -> list[Result]:
    """Return `probe_top1`, `probe_top5`, `probe_mean_per_class` and `probe_l2` (no interval)."""
    found = self.test.results(level, prefix)
    return [*found, Result(f"{prefix}_l2", self.l2, self.test.top1.count)]


@dataclasses.dataclass(frozen=True)
class FewShot:
  """Result of few-shot probes.

  Attributes:
    shots: numbers of examples per class, length S.
    right: [S][D] arrays bool [M], whether each test row was classified correctly in each draw.
  """

  shots: tuple[int, ...]
  right: tuple[tuple[np.ndarray, ...], ...]

  def accuracy(self) -> np.ndarray:
    """Return the accuracy of each draw, float64 [S, D]."""
    return np.array([[draw.mean() for draw in draws] for draws in self.right])

  def results(self, level: float = 0.95) -> list[Result]:
    """Return `few_shot_<n>_top1`, the mean over draws.

    The interval combines two variances: that of the mean over draws (Student's t over D draws; 0
    with one draw) and that over test rows.
    """
    found = []
    for shots, draws in zip(self.shots, self.right, strict=True):
      state = Mean.of(np.mean(draws, axis=0))
      half = state.interval(level)[1] - state.value
      if len(draws) > 1:
        error = float(np.std([draw.mean() for draw in draws], ddof=1)) / math.sqrt(len(draws))
        half = math.hypot(half, error * float(scipy.stats.t.ppf((1 + level) / 2, len(draws) - 1)))
      low, high = max(0.0, state.value - half), min(1.0, state.value + half)
      name = f"few_shot_{shots}_top1"
      found.append(Result(name, state.value, state.count, low, high, "share"))
    return found


def linear_probe(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  *,
  validation: tuple[np.ndarray, np.ndarray] | float = 0.2,
  l2: Sequence[float] = L2,
  num_classes: int | None = None,
  seed: int = 0,
  max_iterations: int = 500,
  chunk: int = 8192,
) -> Probe:
  """Fit logistic regression by L-BFGS for each `l2`, select the best, and refit on all rows.

  The loss is mean cross-entropy + l2 / 2 |W|^2; the bias is not regularised. Features are centred
  and divided by one scalar, so that their mean squared norm is 1. Centring does not change the
  optimum, and scaling makes `l2` comparable between models. This equals scikit-learn's
  LogisticRegression with C = 1 / (l2 N) on the scaled features. Test rows are used only for the
  final evaluation.

  Args:
    train, test: features float [N, E] and [M, E], valid rows only; every process passes all rows.
    train_labels, test_labels: labels int [N] and [M].
    validation: (features, labels) used to select `l2`, or the fraction of each class of `train` to
      hold out (at least one row per class is kept for training). Ties go to the stronger `l2`.
    l2: regularisation strengths to try; a single one is used without validation.
    num_classes: number of classes; largest label + 1 by default.
    seed: seed of the held-out rows.
    max_iterations: maximum number of iterations of each fit.
    chunk: number of rows whose class scores are held at once; the device holds all features.

  Raises:
    ValueError: see `knn`; also if no row can be held out.
  """
  train, train_labels, num_classes = check_features(
    train, train_labels, test, test_labels, num_classes
  )
  strengths = sorted(set(l2), reverse=True)
  if not strengths or strengths[-1] <= 0:
    raise ValueError(f"l2={tuple(l2)} must be numbers > 0.")
  tried: list[tuple[float, Share]] = []
  if len(strengths) > 1:
    if isinstance(validation, tuple):
      held, held_labels = validation
      fitted, fitted_labels, _ = check_features(train, train_labels, held, held_labels, num_classes)
    else:
      out = _hold_out(train_labels, validation, seed)
      fitted, fitted_labels = train[~out], train_labels[~out]
      held, held_labels = train[out], train_labels[out]
    problem = _Problem(fitted, fitted_labels, num_classes, chunk)
    weights = problem.zeros()
    for strength in strengths:  # warm start from the previous, stronger regularisation
      weights, _ = problem.fit(weights, strength, max_iterations)
      right = problem.scores(weights, held).argmax(1) == held_labels
      tried.append((strength, Share.of(right)))
    best = max(tried, key=lambda pair: pair[1].value)[0]
    if isinstance(validation, tuple):
      train = np.concatenate([train, np.asarray(held, np.float32)])
      train_labels = np.concatenate([train_labels, np.asarray(held_labels, np.int64)])
  else:
    best = strengths[0]
  problem = _Problem(train, train_labels, num_classes, chunk)
  weights, found = problem.fit(problem.zeros(), best, max_iterations)
  return Probe(
    test=_classify(problem, weights, test, test_labels),
    l2=best,
    validation=tuple(tried),
    iterations=int(found.nit),
    converged=found.status != 1,  # 1: limit reached; 2: line search ended by float32 rounding
  )


def few_shot(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  *,
  shots: Sequence[int] = (1, 2, 4, 8, 16),
  draws: int = 5,
  l2: float = 1e-4,
  num_classes: int | None = None,
  seed: int = 0,
  max_iterations: int = 500,
) -> FewShot:
  """Train linear probes on `shots` random examples per class, repeated `draws` times.

  Draw d with n shots is a subset of draw d with more shots. `l2` is fixed, because so few examples
  leave none for validation.

  Args:
    train, train_labels, test, test_labels, num_classes, max_iterations: see `linear_probe`.
    shots: numbers of examples per class.
    draws: number of random subsets per number of shots.
    l2: regularisation strength, as in `linear_probe`.
    seed: seed of the random subsets.

  Raises:
    ValueError: see `linear_probe`; also if a class has too few training rows.
  """
  train, train_labels, num_classes = check_features(
    train, train_labels, test, test_labels, num_classes
  )
  counts = np.bincount(train_labels, minlength=num_classes)
  present = np.flatnonzero(counts)
  rarest = int(present[counts[present].argmin()])
  if not shots or draws < 1 or min(shots) < 1 or max(shots) > counts[rarest]:
    raise ValueError(
      f"shots={tuple(shots)} and draws={draws} must be >= 1, shots at most {counts[rarest]}: "
      f"class {rarest} has no more training rows."
    )
  labels = np.asarray(test_labels)
  right: list[tuple[np.ndarray, ...]] = []
  for n in shots:
    outcomes = []
    for draw in range(draws):
      # Shuffle, sort stably by class, and take the first n rows of each class.
      order = np.random.default_rng([seed, draw]).permutation(len(train))
      order = order[np.argsort(train_labels[order], kind="stable")]
      starts = np.cumsum(counts[present]) - counts[present]
      rows = order[(starts[:, None] + np.arange(n)).ravel()]
      problem = _Problem(train[rows], train_labels[rows], num_classes, len(rows))
      weights, _ = problem.fit(problem.zeros(), l2, max_iterations)
      outcomes.append(problem.scores(weights, test).argmax(1) == labels)
    right.append(tuple(outcomes))
  return FewShot(tuple(shots), tuple(right))


class _Problem:
  """Logistic regression with features on the device and L-BFGS on the host."""

  def __init__(self, features: np.ndarray, labels: np.ndarray, num_classes: int, chunk: int):
    self._mean = features.mean(0, dtype=np.float64).astype(np.float32)
    centred = features - self._mean
    square = float(np.square(centred, dtype=np.float64).sum(1).mean())
    self._scale = np.float32(math.sqrt(square) or 1.0)
    self._shape = features.shape[1] + 1, num_classes
    self._chunk = min(chunk, len(features))
    count = -(-len(features) // self._chunk)
    padded = np.zeros((count * self._chunk, features.shape[1]), np.float32)
    padded[: len(features)] = centred / self._scale
    classes = np.full(len(padded), -1, np.int32)  # -1 marks padding
    classes[: len(labels)] = labels
    self._features = jnp.asarray(padded.reshape(count, self._chunk, -1))
    self._labels = jnp.asarray(classes.reshape(count, self._chunk))
    self._size = np.float32(len(features))

  def zeros(self) -> np.ndarray:
    return np.zeros(self._shape[0] * self._shape[1])

  def fit(
    self, start: np.ndarray, l2: float, max_iterations: int
  ) -> tuple[np.ndarray, "scipy.optimize.OptimizeResult"]:
    """Return the fitted weights, flat float64 [(E+1) C], and the result of the optimizer."""

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
      weights = flat.reshape(self._shape).astype(np.float32)
      loss, grad = jax.device_get(_cross_entropy(weights, self._features, self._labels, self._size))
      kernel = flat.reshape(self._shape).copy()
      kernel[-1] = 0.0  # do not regularise the bias
      total = float(loss) + 0.5 * l2 * float(np.square(kernel).sum())
      return total, (grad.astype(np.float64) + l2 * kernel).ravel()

    # A smaller ftol is below the rounding error of float32 sums, about 1e-7 of the loss.
    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 1e-9, "gtol": 1e-6}
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x, found

  def scores(self, weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return class scores float32 [M, C]."""
    kernel = weights.reshape(self._shape).astype(np.float32)
    rows = (np.asarray(features, np.float32) - self._mean) / self._scale
    return rows @ kernel[:-1] + kernel[-1]


@jax.jit
def _cross_entropy(
  weights: jax.Array, features: jax.Array, labels: jax.Array, size: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the mean cross-entropy over [count, chunk] rows and its gradient [E+1, C]."""

  def part(kernel: jax.Array, rows: jax.Array, classes: jax.Array) -> jax.Array:
    scores = jnp.matmul(rows, kernel[:-1], precision=jax.lax.Precision.HIGHEST) + kernel[-1]
    own = jnp.take_along_axis(scores, jnp.maximum(classes, 0)[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(scores, axis=1) - own
    return jnp.sum(jnp.where(classes >= 0, losses, 0.0)) / size

  def add(
    sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    loss, grad = jax.value_and_grad(part)(weights, *chunk)
    return (sums[0] + loss, sums[1] + grad), None

  zero = jnp.zeros((), jnp.float32), jnp.zeros_like(weights)
  return jax.lax.scan(add, zero, (features, labels))[0]


def _classify(
  problem: _Problem, weights: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> Classification:
  return Classification.of(
    problem.scores(weights, test), np.asarray(labels), np.ones(len(labels), bool)
  )


def _hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Return a mask bool [N] of the held-out rows: `fraction` of each class, but not all of it."""
  if not 0 < fraction < 1:
    raise ValueError(f"validation={fraction} must be a fraction between 0 and 1.")
  out = np.zeros(len(labels), bool)
  random = np.random.default_rng(seed)
  for label in np.unique(labels):
    rows = random.permutation(np.flatnonzero(labels == label))
    out[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = True
  if not out.any():
    raise ValueError(
      f"no class is large enough to hold out {fraction:.0%} of it; pass validation rows or one l2."
    )
  return out
