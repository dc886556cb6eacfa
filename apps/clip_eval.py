"""Evaluators of two-tower models on held-out data: zero-shot classification and retrieval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apps import clip_gallery, features
from apps.label_data import LabeledImages, check_distinct
from apps.trainer.held_out import HeldOut
from apps.trainer.report import ClassTable
from apps.trainer.task import Evaluation, Params
import ov_eval

TEXT_CHUNK = 256  # texts per batch, rounded up to a multiple of the devices


class Embedder:
  """Embeds images and texts as unit vectors; texts are preprocessed as in training."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    processor = held_out.task.text_processor(held_out.tokenizer)
    if processor is None:
      raise ValueError("texts cannot be embedded: config.model.text is empty")
    self._processor = processor
    devices = held_out.mesh.size
    self._chunk = -(-TEXT_CHUNK // devices) * devices

  def ids(self, prompts: list[str]) -> np.ndarray:
    """Return the token ids int [N, T] of prompts."""
    return self._processor.encode_prompts(prompts)

  def texts(self, params: Params, texts: list[str], *, prompts: bool) -> np.ndarray:
    """Embed texts as float32 [N, E]; `prompts` are canonicalised, captions are not."""
    task, mesh = self._held_out.task, self._held_out.mesh
    with self._held_out.progress("texts embedded") as progress:
      return ov_eval.embed_texts(
        features.text_embedder(task.model, params, mesh),
        self._processor.encode_prompts if prompts else self._processor.encode,
        texts,
        chunk=self._chunk,
        progress=progress,
      )

  def images(self, params: Params, gallery_images: dict[int, np.ndarray]) -> features.EmbedImages:
    """Return a function from a batch to float32 [b, E]; it stores `gallery_images`."""
    embed = features.image_embedder(self._held_out.task, params, self._held_out.mesh)
    if not self._held_out.config.eval.gallery:
      return embed

    def embed_and_keep(batch: Mapping[str, Any]) -> np.ndarray:
      clip_gallery.keep_images(batch, gallery_images)
      return embed(batch)

    return embed_and_keep


def class_matrix(vectors: np.ndarray, counts: Sequence[int]) -> np.ndarray:
  """Return one unit vector per class [C, E], the normalised mean of the vectors of its texts.

  Args:
    vectors: unit vectors [N, E] of the texts, grouped by class.
    counts: number of texts of each class.
  """
  ends = np.cumsum(counts)
  means = np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])])
  return np.asarray(means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-8))


class ZeroShotEvaluator:
  """Zero-shot classification: predicts the class with the nearest text embedding."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    self._embedder = Embedder(held_out)
    self._images = LabeledImages(held_out)
    classes = self._images.classes
    texts = [text for own in classes.prompts for text in own]
    check_distinct(classes, held_out.tokenizer, self._embedder.ids(texts))

  def __call__(self, params: Params) -> Evaluation:
    classes = self._images.classes
    matrix = self._class_matrix(params)
    gallery_images: dict[int, np.ndarray] = {}
    found, predictions = ov_eval.classify_by_embedding(
      self._embedder.images(params, gallery_images),
      matrix,
      self._images.batches("images classified"),
    )
    self._held_out.write_predictions("zero_shot", predictions.records(list(classes.names)))
    worst = ov_eval.worst_mistakes(predictions, self._held_out.config.eval.gallery)
    gallery = clip_gallery.mistakes(worst, list(classes.names), gallery_images)
    results = self._held_out.annotate(
      found.results(), "zero_shot", self._images.examples, **classes.description
    )
    return Evaluation(
      tuple(results),
      classes=ClassTable(classes.names, found.confusion.counts),
      galleries=(gallery,) if gallery.rows else (),
    )

  def _class_matrix(self, params: Params) -> np.ndarray:
    """Return one vector per class: the normalised mean of the unit vectors of its texts."""
    prompts = self._images.classes.prompts
    texts = [text for of_class in prompts for text in of_class]
    vectors = self._embedder.texts(params, texts, prompts=True)
    return class_matrix(vectors, [len(texts) for texts in prompts])


class RetrievalEvaluator:
  """Image-to-text and text-to-image retrieval over the held-out data."""

  def __init__(self, held_out: HeldOut):
    self._held_out = held_out
    wanted, data = held_out.config.eval.retrieval, held_out.config.input
    self._embedder = Embedder(held_out)
    self._data = held_out.open(
      wanted,
      image_root=wanted.image_root,
      caption_keys=tuple(wanted.caption_keys) or tuple(data.alt_keys),
      texts={},
      captions="all",
    )

  def __call__(self, params: Params) -> Evaluation:
    gallery_images: dict[int, np.ndarray] = {}
    images = ov_eval.collect_embeddings(
      self._embedder.images(params, gallery_images),
      self._held_out.batches("images embedded", self._data),
      columns=("captions",),
    )
    of_image = images.columns["captions"]
    if self._held_out.config.eval.retrieval.merge_equal_texts:
      captions, pairs = ov_eval.merge_captions(of_image)
    else:
      captions, owner = ov_eval.flatten_captions(of_image)
      pairs = np.stack([np.arange(len(captions)), owner], 1)
    texts = self._embedder.texts(params, captions, prompts=False)
    with self._held_out.progress("similarities") as progress:
      found = ov_eval.retrieval(images.vectors, texts, pairs, progress=progress)
    self._held_out.write_predictions(
      "retrieval_img2txt", _ranks(found.img2txt, images.index.tolist())
    )
    first = pairs[np.unique(pairs[:, 0], return_index=True)[1], 1]  # an image of each text
    self._held_out.write_predictions(
      "retrieval_txt2img",
      [
        {"caption": captions[i], **line}
        for i, line in enumerate(_ranks(found.txt2img, images.index[first].tolist()))
      ],
    )
    results = self._held_out.annotate(
      found.results(),
      "retrieval",
      self._data,
      images=len(images.vectors),
      texts=len(captions),
      **({"correct_pairs": len(pairs)} if len(pairs) > len(captions) else {}),
    )
    shown = self._held_out.config.eval.gallery
    return Evaluation(
      tuple(results),
      galleries=clip_gallery.retrieved(
        images, texts, captions, pairs, found, gallery_images, shown
      ),
    )


def _ranks(ranks: ov_eval.QueryRanks, index: list[int]) -> list[dict[str, Any]]:
  """Return the image index and the expected rank of the correct item of each query."""
  return [
    {"index": index[row], "rank": rank}
    for row, rank in zip(ranks.queries.tolist(), ranks.expected_rank.tolist(), strict=True)
  ]
