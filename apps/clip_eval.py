"""What two towers are worth on held-out data: zero-shot classification and retrieval."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from apps import clip_gallery, features
from apps.label_data import LabelledPictures, check_distinct
from apps.trainer.held_out import HeldOut
from apps.trainer.report import ClassTable
from apps.trainer.task import Evaluation, Params
import ov_eval

TEXT_CHUNK = 256  # texts embedded at a time, rounded up to whole devices


class _Embedder:
  """Pictures and texts to unit vectors, texts prepared as in training."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    processor = held_out.task.text_processor(held_out.tokenizer)
    if processor is None:
      raise ValueError("texts cannot be embedded: config.model.text is empty")
    self._processor = processor
    devices = held_out.mesh.size
    self._chunk = -(-TEXT_CHUNK // devices) * devices

  def ids(self, prompts: list[str]) -> np.ndarray:
    """Ids int [N, T] of prompts."""
    return self._processor.encode_prompts(prompts)

  def texts(self, params: Params, texts: list[str], *, prompts: bool) -> np.ndarray:
    """float32 [N, E]; `prompts` are canonicalised, captions are not."""
    task, mesh = self._held_out.task, self._held_out.mesh
    with self._held_out.progress("texts embedded") as progress:
      return ov_eval.embed_texts(
        features.text_embedder(task.model, params, mesh),
        self._processor.encode_prompts if prompts else self._processor.encode,
        texts,
        chunk=self._chunk,
        progress=progress,
      )

  def images(self, params: Params, pictures: dict[int, np.ndarray]) -> features.EmbedImages:
    """Batch -> float32 [b, E]; keeps some of the pictures for galleries in `pictures`."""
    embed = features.image_embedder(self._held_out.task.model, params, self._held_out.mesh)
    if not self._held_out.config.eval.gallery:
      return embed

    def embed_and_keep(batch: Mapping[str, Any]) -> np.ndarray:
      clip_gallery.keep_pictures(batch, pictures)
      return embed(batch)

    return embed_and_keep


class ZeroShotEvaluator:
  """The class whose texts are nearest to a picture."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    self._embedder = _Embedder(held_out)
    self._pictures = LabelledPictures(held_out)
    classes = self._pictures.classes
    texts = [text for own in classes.prompts for text in own]
    check_distinct(classes, held_out.tokenizer, self._embedder.ids(texts))

  def __call__(self, params: Params) -> Evaluation:
    classes = self._pictures.classes
    matrix = self._class_matrix(params)
    pictures: dict[int, np.ndarray] = {}
    found, predictions = ov_eval.classify_by_embedding(
      self._embedder.images(params, pictures),
      matrix,
      self._pictures.batches("pictures classified"),
    )
    self._held_out.write_predictions("zero_shot", predictions.records(list(classes.names)))
    worst = ov_eval.worst_mistakes(predictions, self._held_out.config.eval.gallery)
    gallery = clip_gallery.mistakes(worst, list(classes.names), pictures)
    results = self._held_out.told(
      found.results(), "zero_shot", self._pictures.examples, **classes.description
    )
    return Evaluation(
      tuple(results),
      classes=ClassTable(classes.names, found.confusion.counts),
      galleries=(gallery,) if gallery.rows else (),
    )

  def _class_matrix(self, params: Params) -> np.ndarray:
    """One vector for each class: the mean of the unit vectors of its texts, unit norm again."""
    prompts = self._pictures.classes.prompts
    texts = [text for of_class in prompts for text in of_class]
    vectors = self._embedder.texts(params, texts, prompts=True)
    ends = np.cumsum([len(texts) for texts in prompts])
    means = np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])])
    return means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-8)


class RetrievalEvaluator:
  """Pictures to their captions and back, over all of the held-out data."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    wanted, data = held_out.config.eval.retrieval, held_out.config.input
    self._embedder = _Embedder(held_out)
    self._data = held_out.open(
      wanted,
      image_root=wanted.image_root,
      caption_keys=tuple(wanted.caption_keys) or tuple(data.alt_keys),
      texts={},
      captions="all",
    )

  def __call__(self, params: Params) -> Evaluation:
    pictures: dict[int, np.ndarray] = {}
    images = ov_eval.collect_embeddings(
      self._embedder.images(params, pictures),
      self._held_out.batches("pictures embedded", self._data),
      columns=("captions",),
    )
    captions, owner = ov_eval.flatten_captions(images.columns["captions"])
    texts = self._embedder.texts(params, captions, prompts=False)
    with self._held_out.progress("similarities") as progress:
      found = ov_eval.retrieval(images.vectors, texts, owner, progress=progress)
    self._held_out.write_predictions(
      "retrieval_img2txt", _ranks(found.img2txt, images.index.tolist())
    )
    self._held_out.write_predictions(
      "retrieval_txt2img",
      [
        {"caption": captions[i], **line}
        for i, line in enumerate(_ranks(found.txt2img, images.index[owner].tolist()))
      ],
    )
    results = self._held_out.told(
      found.results(), "retrieval", self._data, images=len(images.vectors), texts=len(captions)
    )
    shown = self._held_out.config.eval.gallery
    return Evaluation(
      tuple(results),
      galleries=clip_gallery.retrieved(images, texts, captions, owner, found, pictures, shown),
    )


def _ranks(ranks: ov_eval.QueryRanks, index: list[int]) -> list[dict[str, Any]]:
  """For each query the picture it is, or belongs to, and the expected rank of the right answer."""
  return [
    {"index": index[row], "rank": rank}
    for row, rank in zip(ranks.queries.tolist(), ranks.expected_rank.tolist(), strict=True)
  ]
