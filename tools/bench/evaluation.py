"""Benchmark of evaluation: zero-shot classification, retrieval, caption likelihood, generation.

The models are those of the apps, with newly initialized weights and random images and texts. The
benchmark calls the functions of ov_eval and ov_models that the evaluators of the apps call, with
weights and data in memory and all programs compiled.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apps.trainer.augment import normalise
from apps.trainer.run_config import RunConfig
import ov_data
import ov_eval
import ov_models
from tools.bench.compiling import load_config, plan_of
from tools.bench.harness import Benchmark, Case, measured, rates, timed

PIXELS = (84, 160)
TOWERS = "img=Ti/16,txt_name=Ti,txt_decoder_name=Ti,res={},batch_size=64"
WRITER = "img=Ti/16,txt_decoder_name=Ti,res=160,batch_size=16"
# ImageNet's validation set, with CLIP's templates and the plain class name.
PICTURES, CLASSES, TEMPLATES = 50_000, 1000, 81
CHUNK = 256  # batch size of texts, as in the evaluators
BATCH, SOME_PICTURES, SOME_CLASSES = 64, 256, 3  # the part that is measured
# The largest data set with published retrieval results (COCO), at the embedding width of B/16.
IMAGES, CAPTIONS_EACH, WIDTH = 5000, 5, 512
LENGTHS, CAPTIONS = (16, 32, 64), 4  # tokens of a generated caption, batch size
SCORED = 32  # captions to score
_WIDTH = 192  # embedding width of Ti/16
_BOS, _EOS = 1, 2

Run = Callable[[], dict[str, float]]


def make(scratch: Path) -> Benchmark:
  """Return the cases. `scratch` is unused."""
  del scratch
  pictures = {
    size: _Part(functools.partial(_embed_pictures, size), PICTURES / SOME_PICTURES)
    for size in PIXELS
  }
  texts = _Part(lambda: _towers(PIXELS[-1]).texts(), _chunks(CLASSES) / _chunks(SOME_CLASSES))
  scores = _Part(classification, 1)
  cases = [Case(f"zero-shot/images, {size} px", part.run) for size, part in pictures.items()]
  cases += [Case("zero-shot/texts", texts.run), Case("zero-shot/scores", scores.run)]
  for size, part in pictures.items():
    total = functools.partial(_estimate, [part, texts, scores])
    cases.append(Case(f"zero-shot/total, {size} px", total, warm_up=False))
  cases += [
    Case("retrieval", retrieval),
    Case("likelihood", lambda: _writer().likelihood()),
  ]
  for length in LENGTHS:
    cases.append(Case(f"generation/{length}", functools.partial(_write, length)))
  return Benchmark(
    "eval",
    f"`zero-shot` uses `apps/configs/openvision.py:{TOWERS.format(PIXELS[-1])}`, also at "
    f"{PIXELS[0]} px: `images` embeds {SOME_PICTURES} images in batches of {BATCH}, `texts` the "
    f"{TEMPLATES} prompts of {SOME_CLASSES} classes, `scores` scores {PICTURES:,} images for "
    f"{CLASSES:,} classes. `total` is an estimate from these three for {PICTURES:,} images and "
    f"{CLASSES * TEMPLATES:,} prompts, without reading images. `retrieval` is {IMAGES:,} images x "
    f"{IMAGES * CAPTIONS_EACH:,} captions of width {WIDTH}, in both directions. The others use "
    f"`apps/configs/openvision2.py:{WRITER}`: `likelihood` of {SCORED} captions of 127 tokens, "
    f"`generation/N` greedy decoding of {CAPTIONS} captions of N tokens in one batch.",
    cases,
    dtype="float32",
  )


def _embed_pictures(pixels: int) -> dict[str, float]:
  return _towers(pixels).pictures()


def _write(length: int) -> dict[str, float]:
  return _writer().write(length)


def _chunks(classes: int) -> int:
  """Return the number of text batches for the prompts of that many classes."""
  return math.ceil(classes * TEMPLATES / CHUNK)


@dataclasses.dataclass
class _Part:
  """A case from which the time of the full evaluation is estimated.

  Attributes:
    measure: function that runs the case.
    times: factor from the case to the full evaluation.
    found: result of the last run.
  """

  measure: Run
  times: float
  found: dict[str, float] | None = None

  def run(self) -> dict[str, float]:
    self.found = self.measure()
    return self.found


def _estimate(parts: Sequence[_Part]) -> dict[str, float]:
  """Estimate the time of the full evaluation from earlier runs; run parts excluded by `--only`."""
  found = [(part.found or part.measure(), part.times) for part in parts]
  return {name: sum(of[name] * times for of, times in found) for name in ("cpu_s", "clock_s")}


@functools.cache
def _towers(pixels: int) -> "Towers":
  return Towers(load_config("openvision.py", TOWERS.format(pixels)))


@functools.cache
def _writer() -> "Writer":
  return Writer(load_config("openvision2.py", WRITER), CAPTIONS, SCORED)


class Towers:
  """Embeds images and texts with both towers, as the evaluators of the apps do."""

  def __init__(
    self,
    config: RunConfig,
    *,
    batch: int = BATCH,
    pictures: int = SOME_PICTURES,
    classes: int = SOME_CLASSES,
    templates: int = TEMPLATES,
    chunk: int = CHUNK,
  ):
    """Create weights and data.

    Args:
      config: configuration of `apps/configs/openvision.py`.
      batch: batch size of images.
      pictures: number of images, a multiple of `batch`.
      classes: number of classes.
      templates: number of prompts per class.
      chunk: batch size of prompts.
    """
    task: Any = plan_of(config).parts.task
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
    """Embed the images."""
    found, seconds = timed(
      lambda: ov_eval.collect_embeddings(
        lambda batch: self._embed_images(self._params, batch["image"]), self._batches
      )
    )
    return seconds | rates("images", len(found.index), seconds)

  def texts(self) -> dict[str, float]:
    """Embed the prompts of all classes."""
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


def classification(
  pictures: int = PICTURES, classes: int = CLASSES, batch: int = BATCH
) -> dict[str, float]:
  """Classify random embeddings in batches."""
  rng = np.random.default_rng(0)
  centres = _unit_rows(rng, classes, _WIDTH)
  labels = rng.integers(0, classes, pictures)
  vectors = _unit_rows(rng, pictures, _WIDTH, 0.2 * centres[labels])
  batches: list[Mapping[str, Any]] = [
    {
      "vectors": vectors[start : start + batch],
      "label": labels[start : start + batch],
      "index": np.arange(start, min(start + batch, pictures)),
      "valid": np.ones(len(labels[start : start + batch]), bool),
    }
    for start in range(0, pictures, batch)
  ]
  _, metrics = measured(
    lambda: ov_eval.classify_by_embedding(lambda batch: batch["vectors"], centres, batches)
  )
  return metrics


def retrieval(
  images: int = IMAGES, captions_each: int = CAPTIONS_EACH, width: int = WIDTH
) -> dict[str, float]:
  """Run image-to-text and text-to-image retrieval on random embeddings, in blocks of scores."""
  rng = np.random.default_rng(0)
  vectors = _unit_rows(rng, images, width)
  owner = np.repeat(np.arange(images), captions_each)
  texts = _unit_rows(rng, len(owner), width, 0.2 * vectors[owner])
  return measured(lambda: ov_eval.retrieval(vectors, texts, owner))[1]


def _unit_rows(
  rng: np.random.Generator, rows: int, width: int, towards: np.ndarray | float = 0.0
) -> np.ndarray:
  """Return random float32 unit vectors [rows, width], shifted by `towards` [rows, width]."""
  x = rng.standard_normal((rows, width), np.float32) / np.float32(width) ** 0.5 + towards
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Writer:
  """Generates and scores captions, as the evaluators of the apps do."""

  def __init__(self, config: RunConfig, captions: int, scored: int):
    """Create weights and data.

    Args:
      config: configuration of `apps/configs/openvision2.py`.
      captions: batch size of generation.
      scored: number of captions to score, a multiple of `config.batch_size`.
    """
    task: Any = plan_of(config).parts.task
    self._model: ov_models.VisionLanguageConfig = task.model
    self._pad = task.pad_id
    self._params = jax.jit(task.init)(jax.random.key(0))
    rng, size, batch = np.random.default_rng(0), task.image_size, config.batch_size
    pictures = lambda count: rng.integers(0, 256, (count, size, size, 3), np.uint8)
    self._images = normalise(jnp.asarray(pictures(captions)))
    vocab = self._model.decoder.vocab_size
    self._batches = [
      {
        "image": pictures(batch),
        "ids": rng.integers(_EOS + 1, vocab, (batch, task.text_len), np.int32),
        "valid": np.ones(batch, bool),
      }
      for _ in range(0, scored, batch)
    ]
    self._score = jax.jit(
      lambda params, batch: task.score(params, batch | {"image": normalise(batch["image"])})
    )

  def likelihood(self) -> dict[str, float]:
    """Compute the likelihood of the captions."""
    found, metrics = measured(
      lambda: ov_eval.caption_nll(lambda batch: self._score(self._params, batch), self._batches)
    )
    return metrics | rates("images", found.examples, metrics)

  def write(self, length: int) -> dict[str, float]:
    """Generate captions of `length` tokens.

    Raises:
      RuntimeError: if a caption ends early, which would time less work.
    """
    model = ov_models.bind(self._model, self._params)
    options = {"bos_id": _BOS, "eos_id": _EOS, "pad_id": self._pad, "max_len": length}
    ids, seconds = timed(lambda: np.asarray(ov_models.generate(model, self._images, **options).ids))
    if ids.shape[1] != length or (ids == _EOS).any():
      raise RuntimeError(f"captions of {ids.shape} end early; expected {length} words each")
    return seconds | rates("tokens", ids.size, seconds)
