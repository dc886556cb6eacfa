"""Float64 NumPy reference of the contrastive losses and their gradients.

It materialises the full similarity matrix and shares no code with the losses.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike


class Example(NamedTuple):
  """Arguments of the losses."""

  image: np.ndarray  # [B,E]
  texts: np.ndarray  # [K,B,E]
  scale: np.ndarray  # []
  bias: np.ndarray  # []
  valid: np.ndarray  # bool [B]
  groups: np.ndarray  # int32 [K,B]


class Gradients(NamedTuple):
  """Gradients with respect to the first four fields of `Example`."""

  image: np.ndarray
  texts: np.ndarray
  scale: np.ndarray
  bias: np.ndarray


class Reference(NamedTuple):
  """Expected loss, metrics and gradients in float64.

  Attributes:
    gradients: gradients of the loss.
    terms: sums of the absolute terms of each gradient. The rounding error of a sum is proportional
      to these, even if the terms cancel.
  """

  loss: float
  image_top1: float
  text_top1: float
  mean_positive: float
  mean_negative: float
  gradients: Gradients
  terms: Gradients


def example(
  batch: int,
  num_texts: int,
  width: int,
  dtype: DTypeLike = np.float32,
  scale: float = 10.0,
  bias: float = -3.0,
  seed: int = 0,
) -> Example:
  """Return unit rows with correlated images and texts, 20% invalid rows and some equal texts."""
  rng = np.random.default_rng(seed)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  image = unit(rng.standard_normal((batch, width)))
  texts = unit(image + 2 * rng.standard_normal((num_texts, batch, width)) / width**0.5)
  valid = rng.random(batch) < 0.8
  valid[0] = True
  groups = rng.integers(0, batch, (num_texts, batch))
  return Example(
    image=image.astype(dtype),
    texts=texts.astype(dtype),
    scale=np.asarray(scale, np.float32),
    bias=np.asarray(bias, np.float32),
    valid=valid,
    groups=groups.astype(np.int32),
  )


def reference(kind: str, given: Example) -> Reference:
  """Return the reference for `kind` "softmax" or "sigmoid". At least one row must be valid."""
  rows = given.valid
  image = given.image[rows].astype(np.float64)
  texts = given.texts[:, rows].astype(np.float64)
  scale, bias = np.float64(given.scale), np.float64(given.bias) * (kind == "sigmoid")
  groups = given.groups[:, rows]
  cosines = np.einsum("ie,kje->kij", image, texts)
  logits = scale * cosines + bias
  own = np.broadcast_to(np.eye(len(image), dtype=bool), cosines.shape)
  negative = groups[:, :, None] != groups[:, None, :]
  positives = np.diagonal(logits, axis1=1, axis2=2)

  if kind == "softmax":
    shown = np.where(own | negative, logits, -np.inf)
    by_row, by_column = (np.logaddexp.reduce(shown, axis, keepdims=True) for axis in (2, 1))
    per_row = (by_row[:, :, 0] + by_column[:, 0, :]) / 2 - positives
    dlogits = (np.exp(shown - by_row) + np.exp(shown - by_column)) / 2 - own
  else:
    pairs = np.where(own, np.logaddexp(0, -logits), negative * np.logaddexp(0, logits))
    per_row = pairs.sum(2)
    probability = np.exp(-np.logaddexp(0, -logits))
    dlogits = np.where(own, probability - 1, negative * probability)
  dlogits = dlogits / per_row.size

  others = np.where(negative, logits, -np.inf)
  return Reference(
    loss=per_row.mean(),
    image_top1=(positives > others.max(2)).mean(),
    text_top1=(positives > others.max(1)).mean(),
    mean_positive=cosines[own].mean(),
    mean_negative=cosines[negative].mean() if negative.any() else 0.0,
    gradients=_gradients(given, dlogits, image, texts, cosines),
    terms=_gradients(given, *map(np.abs, (dlogits, image, texts, cosines))),
  )


def _gradients(
  given: Example, dlogits: np.ndarray, image: np.ndarray, texts: np.ndarray, cosines: np.ndarray
) -> Gradients:
  """Return the gradients of the arguments from the gradients of the logits of the valid rows."""
  by_image, by_texts = np.zeros(given.image.shape), np.zeros(given.texts.shape)
  by_image[given.valid] = given.scale * np.einsum("kij,kje->ie", dlogits, texts)
  by_texts[:, given.valid] = given.scale * np.einsum("kij,ie->kje", dlogits, image)
  return Gradients(by_image, by_texts, np.sum(dlogits * cosines), np.sum(dlogits))
