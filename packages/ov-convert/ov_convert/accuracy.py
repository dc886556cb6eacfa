"""Accuracy of embeddings after the weights of a model were converted to a smaller type."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

NEIGHBORS = 10


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Comparison of the embeddings of converted weights with those of float32 weights.

  Attributes:
    weights: type of the weights, such as "int8".
    bar: smallest accepted cosine.
    count: number of compared inputs by tower, "image" and "text".
    min_cosine: smallest cosine of the two embeddings of an input, by tower.
    mean_cosine: mean cosine, by tower.
    overlap: mean fraction of the 10 nearest images that stay among the 10 nearest: of each text, or
      of each image, without itself, for models without texts. None with fewer than 20 images.
    zero_shot_agreement: fraction of images whose most similar text, out of all compared texts, is
      that of the float32 weights. None without texts or images, or with a single text.
    size: size of the files in bytes.
    float32_size: size of the files with float32 weights.
    speed: time of the float32 model on this CPU, divided by that of the converted model, by tower.
    agreement_bar: smallest accepted zero-shot agreement; 0 accepts any, also None.
  """

  weights: str
  bar: float
  count: Mapping[str, int]
  min_cosine: Mapping[str, float]
  mean_cosine: Mapping[str, float]
  overlap: float | None
  zero_shot_agreement: float | None
  size: int
  float32_size: int
  speed: Mapping[str, float]
  agreement_bar: float = 0.0

  @property
  def worst(self) -> str:
    """Tower with the smallest cosine."""
    return min(self.min_cosine, key=self.min_cosine.__getitem__)

  @property
  def failed(self) -> str | None:
    """First bound that is not met, "min_cosine" or "min_agreement"; None if all are met."""
    if not self.min_cosine[self.worst] >= self.bar:
      return "min_cosine"
    return "min_agreement" if (self.zero_shot_agreement or 0.0) < self.agreement_bar else None

  @property
  def ok(self) -> bool:
    return self.failed is None

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"ok": self.ok}


def measure(
  arrays: Mapping[str, np.ndarray],
  *,
  weights: str,
  bar: float,
  sizes: tuple[int, int],
  speed: Mapping[str, float],
  agreement_bar: float = 0.0,
) -> Accuracy:
  """Compare embeddings.

  Args:
    arrays: `image/before` and `image/after` [N, E], and the same for `text`, as far as the towers
      exist.
    weights: see `Accuracy`.
    bar: see `Accuracy`.
    sizes: bytes before and after the conversion.
    speed: see `Accuracy`.
    agreement_bar: see `Accuracy`.

  Returns:
    The accuracy. A vector with NaN or Inf, or of length 0, has cosine -1.

  Raises:
    ValueError: if there are no embeddings.
  """
  towers = [tower for tower in ("image", "text") if f"{tower}/before" in arrays]
  if not towers:
    raise ValueError(f"arrays={sorted(arrays)}; expected image/before, text/before or both.")
  before = {tower: _unit(arrays[f"{tower}/before"]) for tower in towers}
  after = {tower: _unit(arrays[f"{tower}/after"]) for tower in towers}
  cosines = {
    tower: np.nan_to_num((before[tower] * after[tower]).sum(axis=-1), nan=-1.0) for tower in towers
  }
  return Accuracy(
    weights=weights,
    bar=bar,
    count={tower: len(values) for tower, values in cosines.items()},
    min_cosine={tower: float(values.min()) for tower, values in cosines.items()},
    mean_cosine={tower: float(values.mean()) for tower, values in cosines.items()},
    overlap=_overlap(before, after),
    zero_shot_agreement=_zero_shot_agreement(before, after),
    size=sizes[1],
    float32_size=sizes[0],
    speed=dict(speed),
    agreement_bar=agreement_bar,
  )


def summary(found: Accuracy) -> str:
  """Return a one-line description."""
  parts = [f"{found.weights} weights, compared with float32"]
  for tower, lowest in found.min_cosine.items():
    parts.append(
      f"cosine of {found.count[tower]} {tower} embeddings at least {lowest:.5f}, "
      f"mean {found.mean_cosine[tower]:.5f}"
    )
  if found.overlap is not None:
    parts.append(f"overlap of the {NEIGHBORS} nearest images {found.overlap:.1%}")
  if found.zero_shot_agreement is not None:
    parts.append(f"same zero-shot class of {found.zero_shot_agreement:.1%} of the images")
  parts.append(f"{found.size / 1e6:.1f} of {found.float32_size / 1e6:.1f} MB")
  parts += [f"{tower} tower {speed:.2f}x as fast" for tower, speed in found.speed.items()]
  return "; ".join(parts)


def explain(found: Accuracy) -> str:
  """Return a one-line description of an accuracy below one of its bounds."""
  if found.failed == "min_agreement" and found.zero_shot_agreement is not None:
    return (
      f"the zero-shot agreement of {found.weights} weights with float32 weights is "
      f"{found.zero_shot_agreement:.3f}, expected at least {found.agreement_bar:g}"
    )
  tower = found.worst
  return (
    f"the smallest cosine of {tower} embeddings with {found.weights} weights to those with float32 "
    f"weights is {found.min_cosine[tower]:.3f}, expected at least {found.bar:g}"
  )


def _unit(x: np.ndarray) -> np.ndarray:
  """Return float64 unit vectors; NaN for vectors without a direction."""
  x = x.astype(np.float64)
  with np.errstate(invalid="ignore", divide="ignore"):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _overlap(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float | None:
  """Return the mean overlap of the nearest images; see `Accuracy`."""
  if "image" not in before or len(before["image"]) < 2 * NEIGHBORS:
    return None
  nearest = [_nearest(embeddings) for embeddings in (before, after)]
  shared = [len(set(a) & set(b)) / NEIGHBORS for a, b in zip(*nearest, strict=True)]
  return float(np.mean(shared))


def _zero_shot_agreement(
  before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> float | None:
  """Return the fraction of equal zero-shot classes; see `Accuracy`. NaN agrees with nothing."""
  if "image" not in before or len(before.get("text", ())) < 2:
    return None
  scores = [embeddings["image"] @ embeddings["text"].T for embeddings in (before, after)]
  finite = np.logical_and(*[np.isfinite(rows).all(axis=1) for rows in scores])
  return float(np.mean(finite & (scores[0].argmax(axis=1) == scores[1].argmax(axis=1))))


def _nearest(embeddings: Mapping[str, np.ndarray]) -> list[list[int]]:
  images = embeddings["image"]
  similarity = embeddings.get("text", images) @ images.T
  if "text" not in embeddings:
    np.fill_diagonal(similarity, -np.inf)
  return np.argsort(-np.nan_to_num(similarity, nan=-2.0), axis=1, kind="stable")[
    :, :NEIGHBORS
  ].tolist()
