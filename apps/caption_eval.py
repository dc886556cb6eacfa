"""Evaluators of caption decoders on held-out images.

They compute the likelihood of the true captions; generate captions and compare them with the true
ones and, if the records contain ground truth, per attribute; and classify by prompt likelihood.
"""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from apps.demo import scenes
from apps.label_data import LabeledImages, check_distinct
from apps.trainer.held_out import HeldOut, HostBatch
from apps.trainer.report import ClassTable, Sample
from apps.trainer.task import Evaluation, Params
import ov_eval
import ov_losses
import ov_models
import ov_sharding

ModelConfig = ov_models.VisionLanguageConfig


class CaptionLikelihood:
  """Negative log-likelihood of the true captions."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    self._data = held_out.open(examples=held_out.config.eval.examples)

  def __call__(self, params: Params) -> Evaluation:
    task, mesh = self._held_out.task, self._held_out.mesh
    rows = ov_sharding.batch_sharding(mesh)
    keys = [key for key in task.batch_keys if key != "index"]

    def score(batch: HostBatch) -> Any:
      on_device = ov_sharding.global_batch({key: batch[key] for key in keys}, mesh)
      with jax.set_mesh(mesh):
        scores = _score(task, rows, params, on_device)
      return ov_sharding.local_rows(scores)

    batches = self._held_out.batches("captions scored", self._data)
    found = ov_eval.caption_nll(score, batches)
    return Evaluation(
      tuple(self._held_out.annotate(found.results(), "caption_likelihood", self._data))
    )


class CaptionGenerator:
  """Generates captions for the first held-out images."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    self._config = held_out.config.eval
    self._data = held_out.open(
      extra_keys=(self._config.truth_key,) if self._config.truth_key else (),
      texts={},
      captions="all",
    )

  def __call__(self, params: Params) -> Evaluation:
    config, annotate = self._config, self._held_out.annotate
    records, gallery_images = self._captions(params)
    scored = ov_eval.attribute_accuracy(records, _attributes)
    results = [
      *ov_eval.caption_statistics(records),
      *ov_eval.caption_metrics(records, tokens=config.caption_tokens),
      *scored.results(),
    ]
    lines = [
      {"index": r.index, "generated": r.generated, "references": r.references} for r in records
    ]
    self._held_out.write_predictions("captions", lines)
    return Evaluation(
      tuple(
        annotate(
          results, "captions", self._data, method=config.method, tokens=config.caption_tokens
        )
      ),
      samples=tuple(
        _sample(r, gallery_images[r.index]) for r in records if r.index in gallery_images
      ),
      attribute_words=scenes.ATTRIBUTE_WORDS if config.truth_key else (),
    )

  def _captions(self, params: Params) -> tuple[list[ov_eval.CaptionRecord], dict[int, np.ndarray]]:
    """Return the captions, and the images for the report."""
    config, task, tokenizer = self._config, self._held_out.task, self._held_out.tokenizer
    gallery_images: dict[int, np.ndarray] = {}
    options = {
      "max_len": task.model.decoder.max_len - 1,
      "bos_id": tokenizer.bos_id,
      "eos_id": tokenizer.eos_id,
      "pad_id": tokenizer.pad_id,
      "method": config.method,
      "num_beams": config.num_beams,
      "temperature": config.temperature,
      "top_p": config.top_p,
      "key": jax.random.key(0) if config.method == "sample" else None,
    }
    mesh = self._held_out.mesh

    def generate(batch: HostBatch) -> Any:
      model = ov_models.bind(task.model, params)
      images = task.normalization(_on_device(batch, mesh))
      with jax.set_mesh(mesh):
        ids = ov_models.generate(model, images, **options).ids
      return ov_sharding.local_rows(jax.device_put(ids, ov_sharding.batch_sharding(mesh)))

    def keep(batch: HostBatch, row: int) -> dict[str, Any]:
      if len(gallery_images) < config.gallery:
        gallery_images[int(batch["index"][row])] = batch["image"][row].copy()
      return {"truth": batch[config.truth_key][row]} if config.truth_key else {}

    def with_references() -> Iterator[dict[str, Any]]:
      for batch in self._held_out.batches("captions generated", self._data):
        yield {**batch, "references": batch["captions"]}

    records = ov_eval.generate_captions(
      generate, tokenizer.decode, with_references(), limit=config.caption_examples, extras=keep
    )
    return records, gallery_images


class LikelihoodClassifier:
  """Zero-shot classification without a text tower: predicts the class of the likeliest prompt."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    self._images = LabeledImages(held_out)
    classes, tokenizer = self._images.classes, held_out.tokenizer
    texts = [text for own in classes.prompts for text in own]
    ids, _ = tokenizer.encode_batch(texts, held_out.task.model.decoder.max_len)
    check_distinct(classes, tokenizer, ids)
    self._ids = ids[:, : int((ids != tokenizer.pad_id).sum(1).max())]  # drop padding columns

  def __call__(self, params: Params) -> Evaluation:
    task, mesh, ids = self._held_out.task, self._held_out.mesh, self._ids
    rows = ov_sharding.batch_sharding(mesh)
    classes = self._images.classes
    of_prompt = [i for i, own in enumerate(classes.prompts) for _ in own]

    def encode(batch: HostBatch) -> jax.Array:
      images = _on_device(batch, mesh)
      with jax.set_mesh(mesh):
        return _encode(task, rows, params, images)

    def score(tokens: jax.Array, chunk: np.ndarray) -> tuple[Any, np.ndarray]:
      with jax.set_mesh(mesh):
        of_chunk, count = _score_prompts(task.model, task.pad_id, rows, params, tokens, chunk)
      return ov_sharding.local_rows(of_chunk), np.asarray(count)

    found = ov_eval.classify_by_likelihood(
      encode, score, self._images.batches("images classified"), ids, np.array(of_prompt)
    )
    results = self._held_out.annotate(
      found.results(), "zero_shot_by_likelihood", self._images.examples, **classes.description
    )
    return Evaluation(tuple(results), classes=ClassTable(classes.names, found.confusion.counts))


def _on_device(batch: HostBatch, mesh: jax.sharding.Mesh) -> jax.Array:
  return ov_sharding.global_batch({"image": batch["image"]}, mesh)["image"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  task: Any, rows: NamedSharding, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Return NLL [B] and number of target tokens [B] of the captions of a batch."""
  scores = task.score(params, {**batch, "image": task.normalization(batch["image"])})
  return jax.lax.with_sharding_constraint(scores, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(task: Any, rows: NamedSharding, params: Params, images: jax.Array) -> jax.Array:
  """Encode uint8 [B, H, W, 3] to the image tokens [B, K, D] that the decoder receives."""
  tokens = ov_models.bind(task.model, params).encode(task.normalization(images))[1]
  return jax.lax.with_sharding_constraint(tokens, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score_prompts(
  config: ModelConfig,
  pad_id: int,
  rows: NamedSharding,
  params: Params,
  tokens: jax.Array,
  ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return log-likelihood [B, K] and target tokens [K] of ids [K, T] for image tokens [B, N, D]."""
  model = ov_models.bind(config, params)
  targets, mask = ov_losses.shift_left(ids, pad_id)

  def one_prompt(prompt: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    ids, targets, mask = (jnp.broadcast_to(x, (tokens.shape[0], x.shape[0])) for x in prompt)
    hidden = model.decoder(tokens, ids)
    return ov_losses.sequence_log_likelihood(hidden, model.head_kernel, targets, mask)

  scores = jax.lax.map(one_prompt, (ids, targets, mask)).T
  return jax.lax.with_sharding_constraint(scores, rows), mask.sum(axis=1)


def _attributes(record: ov_eval.CaptionRecord) -> Mapping[str, tuple[int, int]]:
  truth = record.extras.get("truth")
  return scenes.score(record.generated, truth).by_kind if truth else {}


def _sample(record: ov_eval.CaptionRecord, image: np.ndarray) -> Sample:
  pairs = _attributes(record).values()
  right, total = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (None, None)
  return Sample(image, record.generated, record.references, right, total)
