"""Evaluation of a caption model on held-out pictures.

Likelihood of the true captions; captions written for pictures, checked attribute by attribute where
the records hold ground truth; classification by the likelihood of class prompts.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
import numpy as np

from apps.caption_task import CaptionTask, Params
from apps.feature_eval import FeatureEvaluator
from apps.label_data import ClassPrompts, read_class_prompts, with_labels
from apps.trainer import inputs
from apps.trainer.augment import normalise
from apps.trainer.report import ClassTable, Sample
from apps.trainer.task import Evaluation
import ov_data
from ov_data import scenes
import ov_eval
import ov_losses
import ov_models
import ov_sharding

DEVICE_KEYS = ("image", "ids", "valid")


class CaptionEvaluator:
  """Compiled once, called with the params of any step."""

  def __init__(
    self,
    config: ConfigDict,
    task: CaptionTask,
    tokenizer: ov_data.Tokenizer,
    mesh: jax.sharding.Mesh,
  ):
    """Opens the held-out data.

    Raises:
      ValueError: data that cannot be used, or class prompts that do not fit it.
    """
    self._config, self._task, self._tokenizer, self._mesh = config.eval, task, tokenizer, mesh
    self._rows = ov_sharding.batch_sharding(mesh)
    batch_size = config.eval.batch_size or config.batch_size
    open_loader = functools.partial(
      inputs.eval_loader, config, task, tokenizer, mesh, batch_size=batch_size
    )
    truth = (config.eval.truth_key,) if config.eval.truth_key else ()
    self._loader = open_loader(
      config.input.eval_data_dir,
      config.input.eval_split,
      examples=config.eval.examples,
      extra_keys=truth,
    )
    self._classes: ClassPrompts | None = None
    zero_shot = config.eval.zero_shot
    if zero_shot.classes:
      self._classes = read_class_prompts(zero_shot)
      self._class_loader = open_loader(
        zero_shot.dir or config.input.eval_data_dir,
        zero_shot.split if zero_shot.dir else config.input.eval_split,
        examples=zero_shot.examples,
        extra_keys=(zero_shot.label_key,),
        image_key=zero_shot.image_key,
        caption_keys=(),
        texts={},
      )
    self._features = None
    if config.eval.features.train_dir:
      self._features = FeatureEvaluator(config, task, tokenizer, mesh)

  def __call__(self, params: Params) -> Evaluation:
    results = list(ov_eval.caption_nll(self._score(params), self._loader).results())
    records, pictures = self._captions(params)
    samples: tuple[Sample, ...] = ()
    words: tuple[str, ...] = ()
    if records:
      results += ov_eval.caption_statistics(records)
      accuracy = ov_eval.attribute_accuracy(records, _attributes)
      results += accuracy.results()
      samples = tuple(
        _sample(record, pictures[record.index]) for record in records if record.index in pictures
      )
      words = scenes.ATTRIBUTE_WORDS if self._config.truth_key else ()
    classes = None
    if self._classes:
      found = self._classify(params, self._classes.prompts)
      results += ov_eval.with_context(
        found.results(),
        evaluator="zero_shot_by_likelihood",
        split=self._config.zero_shot.split or self._config.zero_shot.dir,
        **self._classes.description,
      )
      classes = ClassTable(tuple(self._classes.names), found.confusion.counts)
    if self._features:
      results += self._features(params).results
    return Evaluation(tuple(results), samples, words, classes)

  def _device(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the devices need of a host batch."""
    return ov_sharding.global_batch(
      {key: batch[key] for key in DEVICE_KEYS if key in batch}, self._mesh
    )

  def _score(self, params: Params) -> Any:
    return lambda batch: ov_sharding.local_rows(
      _score(self._task, self._rows, params, self._device(batch))
    )

  def _captions(self, params: Params) -> tuple[list[ov_eval.CaptionRecord], dict[int, np.ndarray]]:
    """Generated captions of the first pictures, and the pictures that the report shows."""
    config = self._config
    pictures: dict[int, np.ndarray] = {}
    if not config.caption_examples:
      return [], pictures
    options = {
      "max_len": self._task.text_len - 1,
      "bos_id": self._tokenizer.bos_id,
      "eos_id": self._tokenizer.eos_id,
      "pad_id": self._tokenizer.pad_id,
      "method": config.method,
      "num_beams": config.num_beams,
      "temperature": config.temperature,
      "top_p": config.top_p,
      "key": jax.random.key(0) if config.method == "sample" else None,
    }

    def generate(batch: Mapping[str, Any]) -> Any:
      on_device = self._device(batch)
      model = ov_models.bind(self._task.model, params)
      ids = ov_models.generate(model, normalise(on_device["image"]), **options).ids
      return ov_sharding.local_rows(jax.device_put(ids, self._rows))

    def keep(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
      if len(pictures) < config.sample_pictures:
        pictures[int(batch["index"][row])] = batch["image"][row].copy()
      return {"truth": batch[config.truth_key][row]} if config.truth_key else {}

    records = ov_eval.generate_captions(
      generate, self._tokenizer.decode, self._loader, limit=config.caption_examples, extras=keep
    )
    return records, pictures

  def _classify(
    self, params: Params, classes: Mapping[str, tuple[str, ...]]
  ) -> ov_eval.Classification:
    names = list(classes)
    prompts = [prompt for name in names for prompt in classes[name]]
    of_prompt = [i for i, name in enumerate(names) for _ in classes[name]]
    ids, _ = self._tokenizer.encode_batch(prompts, self._task.text_len)
    ids = ids[:, : int((ids != self._tokenizer.pad_id).sum(1).max())]  # no columns of padding

    def encode(batch: Mapping[str, Any]) -> jax.Array:
      return _encode(self._task, self._rows, params, self._device(batch)["image"])

    def score(tokens: jax.Array, chunk: np.ndarray) -> tuple[Any, np.ndarray]:
      of_chunk, count = _score_prompts(self._task, self._rows, params, tokens, chunk)
      return ov_sharding.local_rows(of_chunk), np.asarray(count)

    return ov_eval.classify_by_likelihood(
      encode,
      score,
      with_labels(self._class_loader, self._config.zero_shot.label_key, names),
      ids,
      np.array(of_prompt),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  task: CaptionTask, rows: NamedSharding, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """NLL [B] and target tokens [B] of the captions of a batch."""
  scores = task.score(params, {**batch, "image": normalise(batch["image"])})
  return jax.lax.with_sharding_constraint(scores, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(task: CaptionTask, rows: NamedSharding, params: Params, images: jax.Array) -> jax.Array:
  """uint8 [B, H, W, 3] -> the image tokens [B, K, D] that the decoder gets."""
  tokens = ov_models.bind(task.model, params).encode(normalise(images))[1]
  return jax.lax.with_sharding_constraint(tokens, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_prompts(
  task: CaptionTask, rows: NamedSharding, params: Params, tokens: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log-likelihood [B, K] of prompts ids [K, T] for image tokens [B, N, D]; target tokens [K]."""
  model = ov_models.bind(task.model, params)
  targets, mask = ov_losses.shift_left(ids, task.pad_id)

  def one_prompt(prompt: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    ids, targets, mask = (jnp.broadcast_to(x, (tokens.shape[0], x.shape[0])) for x in prompt)
    hidden = model.decoder(tokens, ids)
    return ov_losses.sequence_log_likelihood(hidden, model.head_kernel, targets, mask)

  scores = jax.lax.map(one_prompt, (ids, targets, mask)).T
  return jax.lax.with_sharding_constraint(scores, rows), mask.sum(axis=1)


def _attributes(record: ov_eval.CaptionRecord) -> Mapping[str, tuple[int, int]]:
  truth = record.extras.get("truth")
  return scenes.score(record.generated, truth).by_kind if truth else {}


def _sample(record: ov_eval.CaptionRecord, picture: np.ndarray) -> Sample:
  pairs = _attributes(record).values()
  right, total = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (None, None)
  return Sample(picture, record.generated, record.references, right, total)
