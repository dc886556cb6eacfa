"""Metric states that merge exactly: any split of the examples, in any order, gives one figure.

Sums are kept as exact rationals (every float is one), so `a + b` is associative to the last bit:
the figure does not depend on batch size, padding or the number of hosts.
"""

import dataclasses
from fractions import Fraction
import math
import statistics
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from ov_eval.results import Result


@dataclasses.dataclass(frozen=True)
class Mean:
  """The weighted mean `sum x / sum w` over examples, with its standard error.

  Attributes:
    count: examples that entered.
    total: sum of x.
    weight: sum of w (equal to `count` when no weights were given).
    xx, xw, ww: sums of x*x, x*w and w*w, from which the standard error follows.
    non_finite: examples whose x was NaN or infinite; one of them makes `value` NaN.
  """

  count: int = 0
  total: Fraction = Fraction()
  weight: Fraction = Fraction()
  xx: Fraction = Fraction()
  xw: Fraction = Fraction()
  ww: Fraction = Fraction()
  non_finite: int = 0

  @classmethod
  def of(
    cls, values: ArrayLike, weights: ArrayLike | None = None, valid: ArrayLike | None = None
  ) -> Self:
    """The state of some examples.

    Args:
      values: x [B], per example a sum over its parts (tokens, attributes) or a single value.
      weights: w [B], the number of parts; 1 each when omitted.
      valid: bool [B]; a row that is False does not count, whatever stands in it.

    Raises:
      ValueError: if the shapes differ or a weight is negative or not finite.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    keep = np.ones(x.shape, bool) if valid is None else np.asarray(valid, bool)
    if not (x.ndim == 1 and x.shape == w.shape == keep.shape):
      raise ValueError(
        f"values {x.shape}, weights {w.shape} and valid {keep.shape} must all have one shape [B]."
      )
    x, w = x[keep], w[keep]
    if not (np.isfinite(w) & (w >= 0)).all():
      raise ValueError("weights of valid rows must be finite and >= 0; give a count of parts.")
    finite = np.isfinite(x)
    non_finite = int((~finite).sum())
    x = np.where(finite, x, 0.0)
    total, weight, xx, xw, ww = (_sum(terms) for terms in (x, w, x * x, x * w, w * w))
    return cls(len(x), total, weight, xx, xw, ww, non_finite)

  def __add__(self, other: Self) -> Self:
    names = [field.name for field in dataclasses.fields(self)]
    return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))

  @property
  def value(self) -> float:
    """`sum x / sum w`; NaN when nothing was counted or something was not finite."""
    return float(self.total / self.weight) if self.weight and not self.non_finite else math.nan

  @property
  def standard_error(self) -> float:
    """Of `value`, by linearisation over examples: sqrt(sum (x - value w)^2) / sum w.

    What resampling whole examples converges to; parts of one example may depend on each other.
    """
    if not self.weight or self.non_finite:
      return math.nan
    mean = self.total / self.weight
    residual = self.xx - 2 * mean * self.xw + mean * mean * self.ww
    return math.sqrt(max(residual, Fraction())) / float(self.weight)

  def interval(self, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of `value` under the normal approximation."""
    half = _quantile(level) * self.standard_error
    return self.value - half, self.value + half

  def result(self, name: str, level: float = 0.95, unit: str = "") -> Result:
    """Value, count and interval under a name."""
    return Result(name, self.value, self.count, *self.interval(level), unit=unit)


@dataclasses.dataclass(frozen=True)
class Share(Mean):
  """A proportion: hits out of trials, one or several trials per example."""

  def interval(self, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval, which stays inside [0, 1] and is not empty at 0 or 1.

    Several trials of one example are not independent: trials are first divided by their design
    effect (variance over examples / binomial variance). With one trial each it is plain Wilson;
    at 0 or 1, where the effect cannot be estimated, each example counts as one trial.
    """
    if not self.weight or self.non_finite:
      return math.nan, math.nan
    p, z = self.value, _quantile(level)
    variance = self.standard_error**2
    n = p * (1 - p) / variance if 0 < p < 1 and variance else float(self.count)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)

  def result(self, name: str, level: float = 0.95, unit: str = "share") -> Result:
    return super().result(name, level, unit)


@dataclasses.dataclass(frozen=True, eq=False)
class Confusion:
  """Counts int64 [C, C]: row = true class, column = predicted class."""

  counts: np.ndarray

  @classmethod
  def of(cls, labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> Self:
    """From true and predicted class numbers, int [B] each, in [0, num_classes)."""
    cells = np.ravel_multi_index(
      (np.asarray(labels), np.asarray(predicted)), (num_classes, num_classes)
    )
    counts = np.bincount(cells, minlength=num_classes**2)
    return cls(counts.reshape(num_classes, num_classes).astype(np.int64))

  def __add__(self, other: Self) -> Self:
    return type(self)(self.counts + other.counts)

  def per_class(self) -> list[Share]:
    """Recall of each class, length C; a class without examples has count 0 and value NaN."""
    hits, totals = self.counts.diagonal(), self.counts.sum(1)
    return [
      Share(n, Fraction(k), Fraction(n), Fraction(k), Fraction(k), Fraction(n))
      for k, n in zip(hits.tolist(), totals.tolist(), strict=True)
    ]

  def mean_per_class(self) -> float:
    """Mean of the recalls of the classes that have examples."""
    values = [share.value for share in self.per_class() if share.count]
    return statistics.fmean(values) if values else math.nan

  def most_confused(self, limit: int = 10) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the most frequent mistakes; ties in order of class numbers."""
    wrong = self.counts - np.diag(self.counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in cells if wrong[i, j]]


def _sum(values: np.ndarray) -> Fraction:
  """The exact sum of finite float64: of the integers m in m * 2^e, for each e."""
  if not np.isfinite(values).all():
    raise OverflowError(
      f"the product of two values is {values[~np.isfinite(values)][0]} in float64; expected values "
      "and weights below 1e154."
    )
  parts, exponents = np.frexp(values)
  integers = np.ldexp(parts, 53).astype(np.int64)  # all bits of a float64
  total = Fraction()
  for exponent in np.unique(exponents).tolist():
    some = integers[exponents == exponent]
    # Halves, so that no sum of int64 runs over.
    high, low = int((some >> 32).sum()), int((some & (2**32 - 1)).sum())
    total += ((high << 32) + low) * Fraction(2) ** (exponent - 53)
  return total


def _quantile(level: float) -> float:
  if not 0 < level < 1:
    raise ValueError(f"level={level} must lie between 0 and 1, such as 0.95.")
  return statistics.NormalDist().inv_cdf((1 + level) / 2)
