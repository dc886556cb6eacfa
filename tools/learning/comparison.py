"""Differences of trainings, and the noise band that summation order alone gives."""

from collections.abc import Iterable, Sequence
import itertools

import numpy as np

from tools.learning.trained import Trained

Pair = tuple[Trained, Trained]

EARLY, LATE = 10, 50  # the first and the last steps of a training that tables summarize
# Differences below these are rounding of float32: 1 ulp is 1.2e-7, and a loss sums hundreds of
# terms. The norm of a gradient sums over all weights and passes through every layer twice.
ROUNDING = {"loss": 1e-6, "grad_norm": 1e-5, "scale": 1e-6}


def distances(pair: Pair, curve: str) -> np.ndarray:
  """Return |a - b| / max(|a|, |b|) of a curve for every step, float64 [steps].

  If one training is shorter, only its steps are compared.
  """
  one, other = (trained.curves[curve] for trained in pair)
  steps = min(len(one), len(other))
  one, other = one[:steps], other[:steps]
  return np.abs(one - other) / np.maximum(np.maximum(np.abs(one), np.abs(other)), 1e-300)


def largest_so_far(pairs: Iterable[Pair], curve: str) -> np.ndarray:
  """Return the largest distance of any pair up to each step, float64 [steps]."""
  return np.maximum.accumulate(np.max([distances(pair, curve) for pair in pairs], axis=0))


def across(some: Sequence[Trained], others: Sequence[Trained]) -> list[Pair]:
  """Return all pairs of one training of each sequence."""
  return list(itertools.product(some, others))


def noise_band(same: Sequence[Pair], curve: str = "loss") -> np.ndarray:
  """Return the largest distance up to each step of trainings that differ in summation order.

  Args:
    same: pairs of trainings of the same program.
    curve: name of the curve; its rounding is the least width of the band.
  """
  return np.maximum(largest_so_far(same, curve), ROUNDING[curve])


def excess(pairs: Sequence[Pair], band: np.ndarray, curve: str = "loss") -> np.ndarray:
  """Return the largest distance up to each step, as a multiple of the noise band."""
  found = largest_so_far(pairs, curve)
  return found / band[: len(found)]


def first_above(multiple: np.ndarray, limit: float) -> int | None:
  """Return the first step, from 1, that exceeds `limit`; None if none does."""
  (steps,) = np.nonzero(multiple > limit)
  return int(steps[0]) + 1 if len(steps) else None


def weight_distance(pair: Pair) -> float:
  """Return the distance of the final weights, relative to their norm.

  Biases of keys are left out. A constant added to every key does not change attention, so their
  gradient is zero up to rounding, and Adam divides this rounding by its own size. They drift at
  random in every implementation, without effect on any output.
  """
  one, other = (trained.weights for trained in pair)
  paths = [path for path in one if not path.endswith("key/bias")]
  norm = lambda arrays: float(
    np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))
  )
  apart = norm([one[path].astype(np.float64) - other[path] for path in paths])
  return apart / norm([one[path] for path in paths])


def held_out(trained: Trained, labels: np.ndarray) -> float:
  """Return the held-out metric in percent: recall@10 of texts by image, or top-1; or the loss.

  Args:
    trained: a training.
    labels: classes of the held-out images, int [N].
  """
  outputs = trained.outputs
  if "nll" in outputs:
    return float(outputs["nll"].mean())
  if "logits" in outputs:
    return 100 * float((outputs["logits"].argmax(1) == labels).mean())
  scores = outputs["image"] @ outputs["text"].T
  better = (scores > np.diag(scores)[:, None]).sum(1)
  return 100 * float((better < 10).mean())


def summary(pairs: Sequence[Pair]) -> dict[str, float]:
  """Return the largest differences of the pairs under the names of the benchmark's metrics."""
  curves = {
    curve: np.max([distances(p, curve) for p in pairs], 0) for curve in ("loss", "grad_norm")
  }
  found = {
    "loss_early": curves["loss"][:EARLY].max(),
    "grad_early": curves["grad_norm"][:EARLY].max(),
    "loss_late": curves["loss"][-LATE:].max(),
    "grad_late": curves["grad_norm"][-LATE:].max(),
    "weights": max(map(weight_distance, pairs)),
  }
  if "scale" in pairs[0][0].curves:
    found["scale_late"] = max(distances(pair, "scale")[-1] for pair in pairs)
  return {name: float(value) for name, value in found.items()}
