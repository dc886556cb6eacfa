"""The cases of `eval` that need no decoder: embedding, zero-shot scores, retrieval."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from apps.trainer.augment import normalise
import ov_data
import ov_eval
import ov_models
from tools.bench.compiling import plan_of
from tools.bench.harness import measured, rates, timed

_WIDTH = 192  # of the space of Ti/16


class Towers:
  """Embedding with the towers of a configuration, as the evaluators of the apps do it."""

  def __init__(
    self,
    config: ConfigDict,
    batch: int,
    pictures: int,
    *,
    classes: int,
    templates: int,
    chunk: int,
  ):
    """Makes weights and data.

    Args:
      config: of `apps/configs/openvision.py`.
      batch: pictures at a time.
      pictures: that are embedded, whole batches.
      classes, templates: of the prompts, `classes` x `templates`.
      chunk: prompts at a time.
    """
    task: Any = plan_of(config, "cpu").parts.task
    model = task.model
    self._params = jax.jit(task.init)(jax.random.key(0))
    rng, size = np.random.default_rng(0), task.image_size
    self._batches = [
      {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "valid": np.ones(batch, bool),
        "index": np.arange(start, start + batch),
      }
      for start in range(0, pictures, batch)
    ]
    self._embed_images = jax.jit(
      lambda params, images: ov_models.bind(model, params).encode_image(normalise(images)).unit
    )
    self._embed_texts = jax.jit(
      lambda params, ids: ov_models.bind(model, params).encode_text(ids).unit
    )
    self._names = [f"Thing_No {number}" for number in range(classes)]
    self._templates = [f"a photo, take {number}, of the {{}}." for number in range(templates)]
    words = ov_eval.class_texts(self._names, self._templates)
    tokenizer = ov_data.Tokenizer.train(words, 1000)
    self._processor, self._chunk = task.text_processor(tokenizer), chunk

  def pictures(self) -> dict[str, float]:
    """Embeds the pictures."""
    found, seconds = timed(
      lambda: ov_eval.collect_embeddings(
        lambda batch: self._embed_images(self._params, batch["image"]), self._batches
      )
    )
    return seconds | rates("images", len(found.index), seconds)

  def texts(self) -> dict[str, float]:
    """The vectors of the classes, from their prompts."""
    _, seconds = timed(
      lambda: ov_eval.class_embeddings(
        lambda ids: self._embed_texts(self._params, ids),
        self._processor.encode_prompts,
        self._names,
        self._templates,
        chunk=self._chunk,
        canonical=False,
      )
    )
    return seconds | rates("texts", len(self._names) * len(self._templates), seconds)


class Scores:
  """Scores of pictures that are embedded already."""

  def __init__(self, pictures: int, classes: int, batch: int):
    rng = np.random.default_rng(0)
    self._classes = _unit_rows(rng, classes, _WIDTH)
    self._labels = rng.integers(0, classes, pictures)
    towards = 0.2 * self._classes[self._labels]  # so that some are found
    self._vectors = _unit_rows(rng, pictures, _WIDTH, towards)
    rows = [slice(start, start + batch) for start in range(0, pictures, batch)]
    self._batches: list[Mapping[str, Any]] = [
      {
        "vectors": self._vectors[part],
        "label": self._labels[part],
        "index": np.arange(pictures)[part],
        "valid": np.ones(len(self._labels[part]), bool),
      }
      for part in rows
    ]
    self.shares: tuple[float, float] | None = None  # right, right among five

  def ours(self) -> dict[str, float]:
    """Batch by batch: counts of classes above the right one."""
    (found, _), figures = measured(
      lambda: ov_eval.classify_by_embedding(
        lambda batch: batch["vectors"], self._classes, self._batches
      )
    )
    self._agree((found.top1.value, found.top5.value))
    return figures

  def naive(self) -> dict[str, float]:
    """One matrix of scores, whose rows are sorted."""

    def classify() -> tuple[float, float]:
      order = np.argsort(-(self._vectors @ self._classes.T), axis=1)
      right = order[:, :5] == self._labels[:, None]
      return right[:, 0].mean(), right.any(1).mean()

    shares, figures = measured(classify)
    self._agree(shares)
    return figures

  def _agree(self, shares: tuple[float, float]) -> None:
    self.shares = self.shares or shares
    # Scores of float32 differ from those of float64 where two classes are as good as equal.
    if not np.allclose(shares, self.shares, atol=1e-3):
      raise RuntimeError(f"two ways to classify found {shares} and {self.shares}; expected equal")


class Retrieval:
  """Pictures to captions and back, of vectors that are there already."""

  def __init__(self, images: int, captions_each: int, width: int):
    rng = np.random.default_rng(0)
    self._images = _unit_rows(rng, images, width)
    self._owner = np.repeat(np.arange(images), captions_each)
    towards = 0.2 * self._images[self._owner]  # so that some are found
    self._texts = _unit_rows(rng, len(self._owner), width, towards)
    self.recall: list[float] = []

  def ours(self) -> dict[str, float]:
    """Blocks of scores, of which counts remain."""
    found, figures = measured(lambda: ov_eval.retrieval(self._images, self._texts, self._owner))
    ways = (found.img2txt, found.txt2img)
    self._agree([ranks.recall(k).value for ranks in ways for k in found.ks])
    return figures

  def naive(self) -> dict[str, float]:
    """One matrix of scores, whose rows and columns are sorted."""

    def recall() -> list[float]:
      scores = self._images @ self._texts.T
      of_images = self._owner[np.argsort(-scores, axis=1)] == np.arange(len(scores))[:, None]
      of_texts = np.argsort(-scores.T, axis=1) == self._owner[:, None]
      ways = (of_images, of_texts)
      return [float(right[:, :k].any(1).mean()) for right in ways for k in (1, 5, 10)]

    found, figures = measured(recall)
    self._agree(found)
    return figures

  def _agree(self, recall: list[float]) -> None:
    self.recall = self.recall or recall
    # Ours counts what float32 cannot tell apart as equal.
    if not np.allclose(recall, self.recall, atol=1e-3):
      raise RuntimeError(f"two ways to retrieve found {recall} and {self.recall}; expected equal")


def _unit_rows(
  rng: np.random.Generator, rows: int, width: int, towards: np.ndarray | float = 0.0
) -> np.ndarray:
  """Random unit vectors float32 [rows, width], moved by `towards` [rows, width]."""
  x = rng.standard_normal((rows, width), np.float32) / np.float32(width) ** 0.5 + towards
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
