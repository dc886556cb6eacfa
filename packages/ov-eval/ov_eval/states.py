"""Exactly mergeable metric states.

Sums are stored as rational numbers, so `a + b` is associative to the last bit: a metric does not
depend on batch size, padding, order or number of hosts.
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
  """Weighted mean `sum x / sum w` over examples, with its standard error.

  Attributes:
    count: number of examples.
    total: sum of x.
    weight: sum of w (equal to `count` if no weights were given).
    xx, xw, ww: sums of x*x, x*w and w*w, used for the standard error.
    non_finite: number of examples whose x is NaN or Inf; if it is not 0, `value` is NaN.
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
    """Return the state of a batch of examples.

    Args:
      values: x [B]; the sum over the parts of each example (tokens, attributes), or one value.
      weights: w [B], the number of parts of each example; 1 by default.
      valid: bool [B]; rows that are False are ignored, whatever they contain.

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
      raise ValueError("weights of valid rows must be finite and >= 0; pass the number of parts.")
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
    """`sum x / sum w`; NaN without examples or with non-finite values."""
    return float(self.total / self.weight) if self.weight and not self.non_finite else math.nan

  @property
  def standard_error(self) -> float:
    """Standard error of `value`, by linearisation: sqrt(sum (x - value w)^2) / sum w.

    This is the limit of resampling whole examples; parts of one example may be dependent.
    """
    if not self.weight or self.non_finite:
      return math.nan
    mean = self.total / self.weight
    residual = self.xx - 2 * mean * self.xw + mean * mean * self.ww
    return math.sqrt(max(residual, Fraction())) / float(self.weight)

  def interval(self, level: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of `value` under the normal approximation."""
    half = _quantile(level) * self.standard_error
    return self.value - half, self.value + half

  def result(self, name: str, level: float = 0.95, unit: str = "") -> Result:
    """Return value, count and interval as a named result."""
    return Result(name, self.value, self.count, *self.interval(level), unit=unit)


@dataclasses.dataclass(frozen=True)
class Share(Mean):
  """Proportion of hits among trials, with one or more trials per example."""

  def interval(self, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval, which stays inside [0, 1] and is not empty at 0 or 1.

    Trials of one example are not independent, so the number of trials is divided by the design
    effect (variance over examples / binomial variance). With one trial per example this is the
    plain Wilson interval. At 0 or 1 the effect cannot be estimated; each example counts as one
    trial.
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
  """Confusion matrix: counts int64 [C, C], rows are true and columns predicted classes."""

  counts: np.ndarray

  @classmethod
  def of(cls, labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> Self:
    """Return the confusion matrix of true and predicted classes, int [B] in [0, num_classes)."""
    cells = np.ravel_multi_index(
      (np.asarray(labels), np.asarray(predicted)), (num_classes, num_classes)
    )
    counts = np.bincount(cells, minlength=num_classes**2)
    return cls(counts.reshape(num_classes, num_classes).astype(np.int64))

  def __add__(self, other: Self) -> Self:
    return type(self)(self.counts + other.counts)

  def per_class(self) -> list[Share]:
    """Return the recall of each class; a class without examples has count 0 and value NaN."""
    hits, totals = self.counts.diagonal(), self.counts.sum(1)
    return [
      Share(n, Fraction(k), Fraction(n), Fraction(k), Fraction(k), Fraction(n))
      for k, n in zip(hits.tolist(), totals.tolist(), strict=True)
    ]

  def mean_per_class(self) -> float:
    """Return the mean recall over the classes that have examples."""
    values = [share.value for share in self.per_class() if share.count]
    return statistics.fmean(values) if values else math.nan

  def macro_f1(self) -> float:
    """Return the mean F1 score over the classes that have examples."""
    hits, totals, predicted = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
    there = totals > 0
    if not there.any():
      return math.nan
    return float((2 * hits / np.maximum(totals + predicted, 1))[there].mean())

  def most_confused(self, limit: int = 10) -> list[tuple[int, int, int]]:
    """Return (true, predicted, count) of the most frequent mistakes; ties by class number."""
    wrong = self.counts - np.diag(self.counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in cells if wrong[i, j]]


def _sum(values: np.ndarray) -> Fraction:
  """Return the exact sum of finite float64 values, by summing integer mantissas per exponent."""
  if not np.isfinite(values).all():
    raise OverflowError(
      f"the product of two values is {values[~np.isfinite(values)][0]} in float64; expected values "
      "and weights below 1e154."
    )
  parts, exponents = np.frexp(values)
  integers = np.ldexp(parts, 53).astype(np.int64)  # a float64 has a 53-bit mantissa
  total = Fraction()
  for exponent in np.unique(exponents).tolist():
    some = integers[exponents == exponent]
    # Sum the upper and lower 32 bits separately, so that int64 cannot overflow.
    high, low = int((some >> 32).sum()), int((some & (2**32 - 1)).sum())
    total += ((high << 32) + low) * Fraction(2) ** (exponent - 53)
  return total


def _quantile(level: float) -> float:
  if not 0 < level < 1:
    raise ValueError(f"level={level} must be between 0 and 1, such as 0.95.")
  return statistics.NormalDist().inv_cdf((1 + level) / 2)
