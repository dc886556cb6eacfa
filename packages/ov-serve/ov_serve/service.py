"""Model and index of a server: concurrent requests in common batches, limits, and images."""

import asyncio
from collections.abc import Sequence
from concurrent import futures
import functools
import hashlib
import io
import logging
import time
from typing import Any

import numpy as np
from PIL import Image

import ov_data
from ov_data import decode
from ov_serve import api
from ov_serve.batching import Batcher
from ov_serve.guard import Limits, Refused
from ov_serve.index import Hit, Index, RecordEntry
from ov_serve.metrics import Metrics
from ov_serve.model import SIZES, Caption, Model

log = logging.getLogger("ov_serve")

MAX_BATCH = 32
_DECODERS = 2  # images that are decoded at the same time, each of up to `Limits.pixels`
THUMBNAILS = (32, 1024)  # smallest and largest side


class Service:
  """Answers requests with a model and an index.

  Args:
    model: model.
    index: index of this model, or None for a server without search.
    limits: limits of requests.

  Raises:
    ValueError: if the index belongs to another model.
  """

  def __init__(self, model: Model, index: Index | None, limits: Limits):
    if index is not None and index.info.model.fingerprint != model.fingerprint:
      raise ValueError(
        f"the index {index.folder} belongs to model {index.info.model.fingerprint}, not "
        f"{model.fingerprint}; embed the images again"
      )
    self.model, self.index, self.limits = model, index, limits
    self.metrics = Metrics(0 if index is None else len(index))
    self._image_limits = decode.Limits(max_bytes=limits.body_bytes, max_pixels=limits.pixels)
    self._dataset = None if index is None else _open_images(index)
    self._workers = futures.ThreadPoolExecutor(_DECODERS, "ov-decode")
    self._searchers = futures.ThreadPoolExecutor(2, "ov-search")
    self._images = self._batcher("image", self._embed_images, MAX_BATCH)
    self._texts = self._batcher("text", self._embed_texts, MAX_BATCH)
    self._captions = self._batcher("caption", self._write_captions, 8)

  def _batcher(self, kind: str, run: Any, size: int) -> Batcher[Any, Any]:
    observe = functools.partial(self.metrics.batch, kind)
    batcher = Batcher(run, max_batch=size, max_waiting=self.limits.waiting, observe=observe)
    self.metrics.watch(kind, lambda: batcher.waiting)
    return batcher

  def warm_up(self) -> None:
    """Compile the programs of the usual batch sizes."""
    size = self.model.image_size
    for rows in (rows for rows in SIZES if rows <= MAX_BATCH):
      self.model.embed_images(np.zeros((rows, size, size, 3), np.uint8))
      if self.model.can_embed_text:
        self.model.embed_texts(["a photo"] * rows)
    if self.model.can_caption:
      self.model.caption(np.zeros((1, size, size, 3), np.uint8))

  async def close(self) -> None:
    """End the worker threads."""
    for batcher in (self._images, self._texts, self._captions):
      await batcher.close()
    self._workers.shutdown()
    self._searchers.shutdown()

  def info(self) -> api.InfoResponse:
    """Return what the server offers."""
    return api.InfoResponse(
      self.model.name, self.model.fingerprint, self.model.dim,
      0 if self.index is None else len(self.index), self._dataset is not None,
      self.index is not None and self.model.can_embed_text,
      self.model.can_embed_text, self.model.can_caption,
      self.limits.body_bytes, self.limits.pixels, self.limits.results,
    )  # fmt: skip

  async def decode(self, data: bytes) -> np.ndarray:
    """Decode an image in a thread.

    Raises:
      Refused: if it is not a supported image within the limits.
    """
    run = functools.partial(self.model.decode, data, self._image_limits)
    try:
      return await asyncio.get_running_loop().run_in_executor(self._workers, run)
    except decode.DecodeError as error:
      large = error.reason.startswith("too ")
      raise Refused(413 if large else 422, f"image: {error}", "image") from None

  async def embed_image(self, data: bytes) -> np.ndarray:
    """Return the unit vector of an encoded image, float32 [E]."""
    return await self._images(await self.decode(data))

  async def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
    """Return the unit vectors of texts, float32 [B, E].

    Raises:
      Refused: if the model has no text tower, or a text is too long.
    """
    self._check_texts(texts, "text")
    return np.stack(await self._texts.run_all(texts))

  async def search(self, vector: np.ndarray, k: int) -> api.SearchResponse:
    """Return the k nearest images of a unit vector [E].

    Raises:
      Refused: if there is no index, or k is out of range.
    """
    index = self._index()
    if not 1 <= k <= self.limits.results:
      raise Refused(400, f"k={k}: expected 1 to {self.limits.results}", "k")
    start = time.perf_counter()
    run = functools.partial(index.search, vector[None], k)
    [hits] = await asyncio.get_running_loop().run_in_executor(self._searchers, run)
    milliseconds = 1000 * (time.perf_counter() - start)
    return api.SearchResponse([_match(index, hit) for hit in hits], round(milliseconds, 3))

  def vector_of(self, row: int) -> np.ndarray:
    """Return the vector of a row of the index, float32 [E].

    Raises:
      Refused: if there is no such row.
    """
    index = self._index()
    if not 0 <= row < len(index):
      raise Refused(404, f"row={row}: the index has the rows 0 to {len(index) - 1}", "row")
    return index.vectors[row].astype(np.float32)

  async def classify(
    self, data: bytes, labels: Sequence[str], template: str
  ) -> api.ClassifyResponse:
    """Return the probabilities of labels for an encoded image.

    Raises:
      Refused: if the labels or the template are invalid.
    """
    self._check_texts(labels, "labels", template)
    vector = await self.embed_image(data)
    run = functools.partial(self.model.classify, vector[None], labels, template)
    try:
      [row] = await asyncio.get_running_loop().run_in_executor(self._searchers, run)
    except ValueError as error:
      raise Refused(400, str(error), "labels") from None
    order = np.argsort(-row, kind="stable")
    return api.ClassifyResponse([api.LabelScore(labels[i], float(row[i])) for i in order])

  async def caption(self, data: bytes) -> api.CaptionResponse:
    """Write a caption for an encoded image.

    Raises:
      Refused: if the model writes no captions.
    """
    if not self.model.can_caption:
      raise Refused(501, "this model writes no captions")
    found: Caption = await self._captions(await self.decode(data))
    return api.CaptionResponse(found.text, found.log_prob, found.tokens)

  async def count_tokens(self, texts: Sequence[str]) -> int:
    """Return the number of tokens of texts, without padding."""
    processor = self.model.processor
    if processor is None or not texts:
      return 0
    run = functools.partial(processor.tokenizer.encode_batch, list(texts), processor.length)
    _, mask = await asyncio.get_running_loop().run_in_executor(self._searchers, run)
    return int(mask.sum())

  async def thumbnail(self, row: int, side: int) -> tuple[bytes, str]:
    """Return a JPEG of an image of the index, and its tag for caches.

    Raises:
      Refused: if there is no such image, its file changed, or it cannot be decoded.
    """
    index = self._index()
    if self._dataset is None or not 0 <= row < len(index):
      raise Refused(404, f"row={row}: no such image", "row")
    if not THUMBNAILS[0] <= side <= THUMBNAILS[1]:
      raise Refused(400, f"size={side}: expected {THUMBNAILS[0]} to {THUMBNAILS[1]}", "size")
    run = functools.partial(self._make_thumbnail, index, row, side)
    return await asyncio.get_running_loop().run_in_executor(self._workers, run)

  def _make_thumbnail(self, index: Index, row: int, side: int) -> tuple[bytes, str]:
    assert self._dataset is not None  # `thumbnail`
    entry = _record(index, row)
    try:
      data = self._dataset.read(entry.record, (self._dataset.source.image_key,)).image
    except (ValueError, OSError, IndexError) as error:
      log.warning("row %d, %s: %s", row, entry.key, error)
      data = None
    if data is None or hashlib.blake2b(data, digest_size=16).hexdigest() != entry.hash:
      raise Refused(410, f"row={row}: the image changed since it was embedded; embed again", "row")
    try:
      image = decode.full(data)
    except decode.DecodeError as error:
      raise Refused(
        422, f"row={row}: {entry.key} has no thumbnail: {error}; open the file itself", "row"
      ) from None
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue(), f"{entry.hash}-{side}"

  def _index(self) -> Index:
    if self.index is None:
      raise Refused(404, "this server has no index; start it with --index")
    return self.index

  def _check_texts(self, texts: Sequence[str], param: str, template: str = "{}") -> None:
    """Check number and lengths of texts, before they are copied into a template or tokenized.

    Raises:
      Refused: if the model has no text tower, or a limit is exceeded.
    """
    if not self.model.can_embed_text:
      raise Refused(501, "this model has no text tower; use images", param)
    if not texts or len(texts) > self.limits.texts:
      raise Refused(400, f"{len(texts)} texts; expected 1 to {self.limits.texts}", param)
    places = template.count("{}")
    longest = len(template) - 2 * places + max(places, 1) * max(map(len, texts))
    if longest > self.limits.characters:
      limit = self.limits.characters
      raise Refused(
        400, f"a text of {longest} characters; at most {limit} are accepted; shorten it", param
      )

  def _embed_images(self, images: list[np.ndarray]) -> np.ndarray:
    return self.model.embed_images(np.stack(images))

  def _embed_texts(self, texts: list[str]) -> np.ndarray:
    return self.model.embed_texts(texts)

  def _write_captions(self, images: list[np.ndarray]) -> list[Caption]:
    return self.model.caption(np.stack(images))


def _record(index: Index, row: int) -> RecordEntry:
  """Return a record of the index.

  Raises:
    Refused: if the file of the records is damaged.
  """
  try:
    return index.record(row)
  except ValueError as error:
    log.error("%s", error)
    raise Refused(500, str(error)) from None


def _match(index: Index, hit: Hit) -> api.Match:
  entry = _record(index, hit.row)
  return api.Match(hit.row, round(hit.score, 6), entry.key, entry.captions, entry.class_name)


def _open_images(index: Index) -> ov_data.Dataset | None:
  """Open the images of an index, or log why they are not shown."""
  try:
    return ov_data.Dataset(index.info.source.source)
  except (ValueError, OSError) as error:
    log.warning("the images of %s are not shown: %s", index.folder, error)
    return None
