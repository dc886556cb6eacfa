"""Annotate the records of a source: sizes, hashes, and embeddings of a model; resumable by shard.

A file is computed in fixed batches and written atomically, so an interrupted run continues with the
missing files and produces the same bytes. At most one shard is computed twice.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ov_data import annotations, decode, fs, keep_list, output_lock
from ov_data.annotations import Rows
from ov_data.bad_records import BadRecords, Problem
from ov_data.example import FeatureError
from ov_data.index import counts
from ov_data.perceptual_hash import SIDE, perceptual_hash
from ov_data.sources import Dataset

_READ_AHEAD = 3  # batches that are read and decoded in advance
_SHARD = 10_000  # records per file for sources without shards
_HASH_BYTES = 16

Progress = Callable[[int], object]


class Embedder(Protocol):
  """Model that embeds images, and texts if `can_embed_text`; `ov_serve.Model` is one.

  Attributes:
    fingerprint: hex digits of its weights and preprocessing.
  """

  fingerprint: str

  @property
  def dim(self) -> int:
    """Size E of the embeddings."""

  @property
  def can_embed_text(self) -> bool:
    """Whether texts and images share one space of embeddings."""

  def decode(self, data: bytes, limits: decode.Limits) -> NDArray[np.uint8]:
    """Decode an image to uint8 [S, S, 3]."""

  def embed_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed images [B, S, S, 3]; return unit vectors [B, E]."""

  def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
    """Embed B texts; return unit vectors [B, E]."""


@dataclasses.dataclass(frozen=True)
class Summary:
  """Result of `annotate`.

  Attributes:
    records: number of records of the source.
    annotated: number of records that this run annotated; the others were complete.
    bad: number of unusable records, by reason.
    first_bad: location of the first unusable record of each reason.
    damaged: number of damaged files that were set aside and computed again.
  """

  records: int
  annotated: int
  bad: Mapping[str, int]
  first_bad: Mapping[str, str]
  damaged: int


@dataclasses.dataclass(frozen=True)
class _Facts:
  """Facts about a record; `pixels` are the input of the model."""

  width: int
  height: int
  content_hash: bytes
  perceptual_hash: int
  pixels: NDArray[np.uint8] | None
  text: str | None


def annotate(
  dataset: Dataset,
  out: str | os.PathLike[str],
  *,
  model: Embedder | None = None,
  batch_size: int = 64,
  threads: int | None = None,
  limits: decode.Limits = decode.DEFAULT_LIMITS,
  max_bad_fraction: float = 0.1,
  progress: Progress | None = None,
) -> Summary:
  """Write the annotations of a source; see `ov_data.annotations`.

  Args:
    dataset: source without keep-list.
    out: folder of the annotations; an interrupted run resumes there.
    model: model of the embeddings; None omits them.
    batch_size: number of images per batch of the model.
    threads: number of threads that read and decode; by default one per core.
    limits: limits of encoded images.
    max_bad_fraction: fraction of unusable records above which the run stops.
    progress: called with the number of records that were completed.

  Raises:
    ValueError: if the source has a keep-list, the folder has other annotations, another process
      writes to it, or the model returns NaN or Inf.
    TooManyBadRecords: if too many records are unusable.
    ImportError: if pyarrow is not installed.
  """
  if dataset.keep is not None:
    raise ValueError(
      f"keep_list={dataset.source.keep_list}: annotations describe all records; omit the keep-list"
    )
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1")
  folder = pathlib.Path(out)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file; expected a new folder, or one of annotations")
  dataset.check_keys()
  has_texts = model is not None and model.can_embed_text and bool(dataset.source.caption_keys)
  columns = annotations.columns_of(model is not None, has_texts)
  rows = shards(dataset)
  info = annotations.Info(
    keep_list.identity(dataset),
    " ".join(dataset.source.paths),
    tuple(map(len, rows)),
    "" if model is None else model.fingerprint,
    columns,
    0 if model is None else model.dim,
  )
  recipe = _recipe(info, dataset, batch_size, limits)
  writer = annotations.Writer(folder, info, recipe)
  work = _Work(dataset, model, has_texts, batch_size, threads or _cores(), limits,
               BadRecords(max_bad_fraction, len(dataset)))  # fmt: skip
  annotated = 0
  with output_lock.locked(folder):
    writer.check_recipe()
    for shard, records in enumerate(rows):
      if not writer.is_complete(shard, len(records)):
        writer.write(shard, work.run(records, progress or (lambda _: None)))
        annotated += len(records)
      elif progress:
        progress(len(records))
    found = writer.finish()
  bad, first = unusable(found)
  return Summary(len(dataset), annotated, bad, first, writer.damaged)


@dataclasses.dataclass(frozen=True)
class _Work:
  """Everything that computes a file."""

  dataset: Dataset
  model: Embedder | None
  has_texts: bool
  batch_size: int
  threads: int
  limits: decode.Limits
  bad: BadRecords

  def run(self, records: range, progress: Progress) -> Rows:
    """Return the rows of records."""
    rows = Rows()
    found = self._read_ahead(records)
    while batch := list(itertools.islice(found, self.batch_size)):
      for record, facts, problems in batch:
        self.bad.add(problems, 1)
        rows.record.append(record)
        rows.error.append(problems[0].reason if problems else None)
        rows.location.append(fs.printable(problems[0].location) if problems else None)
        rows.width.append(None if facts is None else facts.width)
        rows.height.append(None if facts is None else facts.height)
        rows.content_hash.append(None if facts is None else facts.content_hash)
        rows.perceptual_hash.append(None if facts is None else facts.perceptual_hash)
      self._embed([facts for _, facts, _ in batch], rows)
      progress(len(batch))
    return rows

  def _embed(self, batch: Sequence[_Facts | None], rows: Rows) -> None:
    """Append the embeddings of a batch."""
    model = self.model
    if model is None:
      return
    pixels = [facts.pixels for facts in batch if facts and facts.pixels is not None]
    images = iter(_checked(model.embed_images(np.stack(pixels))) if pixels else ())
    texts = [facts.text for facts in batch if facts and facts.text is not None]
    vectors = iter(_checked(model.embed_texts(texts)) if texts else ())
    for facts in batch:
      image = None if facts is None else next(images)
      text = None if facts is None or facts.text is None else next(vectors)
      rows.image_embedding.append(None if image is None else image.astype(np.float16))
      rows.text_embedding.append(None if text is None else text.astype(np.float16))
      rows.similarity.append(None if image is None or text is None else float(image @ text))

  def _read_ahead(self, records: range) -> Iterator[tuple[int, _Facts | None, list[Problem]]]:
    """Read and decode records in threads, in order, a few batches ahead."""
    with futures.ThreadPoolExecutor(self.threads, "ov-annotate") as pool:
      tasks: deque[futures.Future[tuple[int, _Facts | None, list[Problem]]]] = deque()
      try:
        for record in records:
          tasks.append(pool.submit(self._facts, record))
          if len(tasks) > _READ_AHEAD * self.batch_size:
            yield tasks.popleft().result()
        while tasks:
          yield tasks.popleft().result()
      finally:
        for task in tasks:
          task.cancel()

  def _facts(self, record: int) -> tuple[int, _Facts | None, list[Problem]]:
    problems: list[Problem] = []
    facts = None
    with self.bad.catch(problems, lambda: self.dataset.location(record)):
      facts = self._read(record)
    return record, facts, problems

  def _read(self, record: int) -> _Facts:
    source = self.dataset.source
    keys = (source.image_key, *(source.caption_keys if self.has_texts else ()))
    found = self.dataset.read(record, keys)
    if found.image is None:
      raise FeatureError(f"no image under {source.image_key}")
    small, width, height = decode.thumbnail(found.image, SIDE, self.limits)
    pixels = None if self.model is None else self.model.decode(found.image, self.limits)
    captions = (text for key in source.caption_keys for text in found.texts.get(key, ()))
    texts = (caption.decode(errors="replace") for caption in captions if caption.strip())
    return _Facts(
      width,
      height,
      hashlib.blake2b(found.image, digest_size=_HASH_BYTES).digest(),
      perceptual_hash(small),
      pixels,
      next(texts, None) if self.has_texts else None,
    )


def shards(dataset: Dataset) -> list[range]:
  """Return the records of each shard, or ranges of a fixed size for sources without shards."""
  sizes = counts(dataset.indexes)
  if not sizes:
    bounds = [*range(0, len(dataset), _SHARD), len(dataset)]
  else:
    bounds = list(itertools.accumulate(sizes, initial=0))
  return [range(first, stop) for first, stop in itertools.pairwise(bounds)]


def _checked(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
  if not np.isfinite(vectors).all():
    raise ValueError("the model returns NaN or Inf; its weights have diverged")
  return vectors


def unusable(found: annotations.Annotations) -> tuple[Counter[str], dict[str, str]]:
  """Return the number of unusable records by reason, and the first location of each."""
  bad: Counter[str] = Counter()
  first: dict[str, str] = {}
  for shard in range(len(found.info.rows)):
    columns = found.read(shard, ("error", "location"))
    for error, location in zip(columns["error"], columns["location"], strict=True):
      if error is not None:
        bad[error] += 1
        first.setdefault(error, location)
  return bad, first


def _recipe(
  info: annotations.Info, dataset: Dataset, batch_size: int, limits: decode.Limits
) -> str:
  """Return 16 hex digits of everything that determines the files, except the image bytes."""
  source = dataset.source
  facts = {**dataclasses.asdict(info), "path": ""}  # the data may be moved
  content = [
    annotations.FORMAT, facts, batch_size if info.model else 0, dataclasses.asdict(limits),
    source.image_key, source.caption_keys,
  ]  # fmt: skip
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
