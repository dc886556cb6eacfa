"""Evaluation of a two-tower model on held-out data: zero-shot, retrieval, probes, captions."""

from collections.abc import Callable, Mapping
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
import numpy as np

from apps import clip_gallery, features
from apps.clip_task import ClipTask, Params
from apps.feature_eval import FeatureEvaluator
from apps.label_data import read_class_prompts, with_labels
from apps.trainer import inputs
from apps.trainer.augment import normalise
from apps.trainer.gallery import Gallery
from apps.trainer.report import ClassTable
from apps.trainer.task import Evaluation
import ov_data
import ov_eval
import ov_sharding

TEXT_CHUNK = 256  # texts embedded at a time, rounded up to whole devices


class ClipEvaluator:
  """What the configuration has data for; compiled once, called with the params of any step."""

  def __init__(
    self,
    config: ConfigDict,
    task: ClipTask,
    tokenizer: ov_data.Tokenizer,
    mesh: jax.sharding.Mesh,
  ):
    """Opens all held-out data.

    Raises:
      ValueError: data that cannot be used, or classes that do not fit.
    """
    self.evaluators: dict[str, Callable[[Params], Evaluation]] = {}
    text_tower = task.model.text is not None
    if config.eval.zero_shot.classes and text_tower:
      self.evaluators["zero_shot"] = ZeroShotEvaluator(config, task, tokenizer, mesh)
    if (config.eval.retrieval.dir or config.input.eval_data_dir) and text_tower:
      self.evaluators["retrieval"] = RetrievalEvaluator(config, task, tokenizer, mesh)
    if config.eval.features.train_dir:
      self.evaluators["features"] = FeatureEvaluator(config, task, tokenizer, mesh)
    if config.input.eval_data_dir and task.model.decoder is not None:
      self.evaluators["captions"] = CaptionLikelihood(config, task, tokenizer, mesh)

  def __call__(self, params: Params) -> Evaluation:
    found = [evaluate(params) for evaluate in self.evaluators.values()]
    return Evaluation(
      tuple(result for evaluation in found for result in evaluation.results),
      classes=next((e.classes for e in found if e.classes is not None), None),
      galleries=tuple(gallery for evaluation in found for gallery in evaluation.galleries),
    )


class _Texts:
  """Texts of any kind to unit vectors, prepared as in training."""

  def __init__(self, task: ClipTask, tokenizer: ov_data.Tokenizer, mesh: jax.sharding.Mesh):
    processor = task.text_processor(tokenizer)
    if processor is None:
      raise ValueError("texts cannot be embedded: config.model.text is empty")
    self.processor = processor
    self._model, self._mesh = task.model, mesh
    self.chunk = -(-TEXT_CHUNK // mesh.size) * mesh.size

  def embed(self, params: Params, texts: list[str], *, prompts: bool) -> np.ndarray:
    """float32 [N, E]; `prompts` are canonicalised, captions are not."""
    return ov_eval.embed_texts(
      features.text_embedder(self._model, params, self._mesh),
      self.processor.encode_prompts if prompts else self.processor.encode,
      texts,
      chunk=self.chunk,
    )


class ZeroShotEvaluator:
  """The class whose texts are nearest to a picture."""

  def __init__(self, config: ConfigDict, task: ClipTask, tokenizer: ov_data.Tokenizer, mesh: Any):
    self._config = wanted = config.eval.zero_shot
    self._shown = config.eval.gallery
    self._task, self._mesh = task, mesh
    self._classes = read_class_prompts(wanted)
    self._texts = _Texts(task, tokenizer, mesh)
    self._loader = inputs.eval_loader(
      config,
      task,
      tokenizer,
      mesh,
      wanted.dir or config.input.eval_data_dir,
      wanted.split if wanted.dir else config.input.eval_split,
      batch_size=config.eval.batch_size or config.batch_size,
      examples=wanted.examples,
      extra_keys=(wanted.label_key,),
      image_key=wanted.image_key,
      caption_keys=(),
      texts={},
    )
    self._preprocessing = _preprocessing(config, task)
    self._predictions = Path(config.eval.per_example) if config.eval.per_example else None

  def __call__(self, params: Params) -> Evaluation:
    names = self._classes.names
    matrix = self._class_matrix(params)
    pictures: dict[int, np.ndarray] = {}

    def embed(batch: Mapping[str, Any]) -> np.ndarray:
      clip_gallery.keep_pictures(batch, pictures)
      return embed_image(batch)

    embed_image = features.image_embedder(self._task.model, params, self._mesh)
    batches = with_labels(self._loader, self._config.label_key, names)
    found, predictions = ov_eval.classify_by_embedding(embed, matrix, batches)
    results = ov_eval.with_context(
      found.results(),
      evaluator="zero_shot",
      split=self._config.split or self._config.dir,
      preprocessing=self._preprocessing,
      **self._classes.description,
    )
    _write_predictions(self._predictions, "zero_shot", predictions.records(names))
    worst = ov_eval.worst_mistakes(predictions, self._shown)
    gallery = clip_gallery.mistakes(worst, names, pictures)
    return Evaluation(
      tuple(results),
      classes=ClassTable(tuple(names), found.confusion.counts),
      galleries=(gallery,) if gallery.rows else (),
    )

  def _class_matrix(self, params: Params) -> np.ndarray:
    """One vector for each class: the mean of the unit vectors of its texts, unit norm again."""
    prompts = self._classes.prompts
    vectors = self._texts.embed(
      params, [text for texts in prompts.values() for text in texts], prompts=True
    )
    ends = np.cumsum([len(texts) for texts in prompts.values()])
    means = np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])])
    return means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-8)


class RetrievalEvaluator:
  """Pictures to their captions and back, over all of the held-out data."""

  def __init__(self, config: ConfigDict, task: ClipTask, tokenizer: ov_data.Tokenizer, mesh: Any):
    wanted, data = config.eval.retrieval, config.input
    self._shown = config.eval.gallery
    self._task, self._mesh = task, mesh
    self._texts = _Texts(task, tokenizer, mesh)
    self._split = wanted.split if wanted.dir else data.eval_split
    self._name = self._split or wanted.dir or data.eval_data_dir
    self._loader = inputs.eval_loader(
      config,
      task,
      tokenizer,
      mesh,
      wanted.dir or data.eval_data_dir,
      self._split,
      batch_size=config.eval.batch_size or config.batch_size,
      examples=wanted.examples,
      image_key=wanted.image_key,
      image_root=wanted.image_root,
      caption_keys=tuple(wanted.caption_keys) or tuple(data.alt_keys),
      texts={},
      captions="all",
    )
    self._preprocessing = _preprocessing(config, task)
    self._predictions = Path(config.eval.per_example) if config.eval.per_example else None

  def __call__(self, params: Params) -> Evaluation:
    pictures: dict[int, np.ndarray] = {}

    def embed(batch: Mapping[str, Any]) -> np.ndarray:
      clip_gallery.keep_pictures(batch, pictures)
      return embed_image(batch)

    embed_image = features.image_embedder(self._task.model, params, self._mesh)
    images = ov_eval.collect_embeddings(embed, self._loader, columns=("captions",))
    captions, owner = ov_eval.flatten_captions(images.columns["captions"])
    texts = self._texts.embed(params, captions, prompts=False)
    found = ov_eval.retrieval(images.vectors, texts, owner)
    results = ov_eval.with_context(
      found.results(),
      evaluator="retrieval",
      split=self._name,
      images=len(images.vectors),
      texts=len(captions),
      preprocessing=self._preprocessing,
    )
    galleries: tuple[Gallery, ...] = ()
    if self._shown:
      galleries = clip_gallery.retrieved(
        images, texts, captions, owner, found, pictures, self._shown
      )
    return Evaluation(tuple(results), galleries=galleries)


class CaptionLikelihood:
  """Negative log-likelihood of the true long captions under the decoder."""

  def __init__(self, config: ConfigDict, task: ClipTask, tokenizer: ov_data.Tokenizer, mesh: Any):
    self._task, self._mesh = task, mesh
    self._split = config.input.eval_split or config.input.eval_data_dir
    self._loader = inputs.eval_loader(
      config,
      task,
      tokenizer,
      mesh,
      config.input.eval_data_dir,
      config.input.eval_split,
      batch_size=config.eval.batch_size or config.batch_size,
      examples=config.eval.caption_examples,
    )
    self._keys = tuple(key for key in task.batch_keys if key != "index")

  def __call__(self, params: Params) -> Evaluation:
    rows = ov_sharding.batch_sharding(self._mesh)

    def score(batch: Mapping[str, Any]) -> Any:
      on_device = ov_sharding.global_batch({k: batch[k] for k in self._keys}, self._mesh)
      return ov_sharding.local_rows(_score(self._task, rows, params, on_device))

    found = ov_eval.caption_nll(score, self._loader).results()
    return Evaluation(tuple(ov_eval.with_context(found, evaluator="captions", split=self._split)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  task: ClipTask, rows: NamedSharding, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """NLL [B] and target tokens [B] of the captions of a batch."""
  scores = task.score(params, {**batch, "image": normalise(batch["image"])})
  return jax.lax.with_sharding_constraint(scores, rows)


def _preprocessing(config: ConfigDict, task: ClipTask) -> str:
  return f"{'squash' if config.input.fit == 'squash' else 'center'} to {task.image_size} px"


def _write_predictions(folder: Path | None, name: str, records: list[dict[str, Any]]) -> None:
  """One JSON line for each example."""
  if folder is None or jax.process_index():
    return
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)
