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
import keyword
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

  @property
  def can_caption(self) -> bool:
    """Whether the model has a caption decoder."""

  def decode(self, data: bytes, limits: decode.Limits) -> NDArray[np.uint8]:
    """Decode an image to uint8 [S, S, 3]."""

  def embed_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed images [B, S, S, 3]; return unit vectors [B, E]."""

  def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
    """Embed B texts; return unit vectors [B, E]."""

  def caption_log_likelihood(
    self, images: NDArray[np.uint8], texts: Sequence[str]
  ) -> NDArray[np.float32]:
    """Return the mean log likelihood per token of the caption of each image, [B]."""


@dataclasses.dataclass(frozen=True)
class LinearHead:
  """A number for each image: the dot product of a vector and its unit embedding, plus a bias.

  Attributes:
    weight: float32 [E].
    bias: added to the dot product.

  Raises:
    ValueError: if a number is NaN or Inf, or the weight is no vector.
  """

  weight: NDArray[np.float32]
  bias: float = 0.0

  def __post_init__(self) -> None:
    if self.weight.ndim != 1 or not (np.isfinite(self.weight).all() and np.isfinite(self.bias)):
      raise ValueError(
        f"weight of shape {self.weight.shape} and bias={self.bias}: expected a vector without NaN "
        "and Inf, and a number"
      )

  def __call__(self, embedding: NDArray[np.float32]) -> float:
    """Return the number of an embedding [E]."""
    return float(embedding.astype(np.float64) @ self.weight.astype(np.float64) + self.bias)


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
  texts: list[str]

  @property
  def text(self) -> str | None:
    """The first caption."""
    return self.texts[0] if self.texts else None


def annotate(
  dataset: Dataset,
  out: str | os.PathLike[str],
  *,
  model: Embedder | None = None,
  likelihood: bool = False,
  heads: Mapping[str, LinearHead] | None = None,
  texts: bool = False,
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
    likelihood: whether to compute the log likelihood of the first caption; requires a captioner.
    heads: linear heads on the image embedding by the name of their column.
    texts: whether to store all captions, for example to balance by queries.
    batch_size: number of images per batch of the model.
    threads: number of threads that read and decode; by default one per core.
    limits: limits of encoded images.
    max_bad_fraction: fraction of unusable records above which the run stops.
    progress: called with the number of records that were completed.

  Raises:
    ValueError: if the source has a keep-list, the folder has other annotations, another process
      writes to it, the model has no captions or another size than a head, or returns NaN or Inf.
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
  heads = dict(heads or {})
  _check_model(dataset, model, likelihood, heads)
  columns = annotations.columns_of(model is not None, has_texts)
  columns += (
    *(["texts"] if texts else []),
    *([annotations.LIKELIHOOD] if likelihood else []),
    *heads,
  )
  rows = shards(dataset)
  info = annotations.Info(
    keep_list.identity(dataset),
    " ".join(dataset.source.paths),
    tuple(map(len, rows)),
    "" if model is None else model.fingerprint,
    columns,
    0 if model is None else model.dim,
  )
  recipe = _recipe(info, dataset, batch_size, limits, heads)
  writer = annotations.Writer(folder, info, recipe)
  work = _Work(dataset, model, has_texts, texts, likelihood, heads, batch_size, threads or _cores(),
               limits, BadRecords(max_bad_fraction, len(dataset)))  # fmt: skip
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
  stores_texts: bool
  likelihood: bool
  heads: Mapping[str, LinearHead]
  batch_size: int
  threads: int
  limits: decode.Limits
  bad: BadRecords

  def run(self, records: range, progress: Progress) -> Rows:
    """Return the rows of records."""
    rows = Rows(more={name: [] for name in self.heads})
    if self.likelihood:
      rows.more[annotations.LIKELIHOOD] = []
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
        if self.stores_texts:
          rows.texts.append(None if facts is None else facts.texts)
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
    pairs = [
      (facts.pixels, facts.text)
      for facts in batch
      if facts and facts.pixels is not None and facts.text is not None
    ]
    texts = [text for _, text in pairs]
    vectors = iter(_checked(model.embed_texts(texts)) if texts and self.has_texts else ())
    scores: Iterator[np.float32] = iter(())
    if self.likelihood and pairs:
      seen = np.stack([image for image, _ in pairs])
      scores = iter(_checked(model.caption_log_likelihood(seen, texts)))
    for facts in batch:
      image = None if facts is None else next(images)
      has_text = facts is not None and facts.text is not None
      text = next(vectors) if has_text and self.has_texts else None
      for name, head in self.heads.items():
        rows.more[name].append(None if image is None else head(image))
      if self.likelihood:
        rows.more[annotations.LIKELIHOOD].append(float(next(scores)) if has_text else None)
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
    needs_text = self.has_texts or self.likelihood or self.stores_texts
    keys = (source.image_key, *(source.caption_keys if needs_text else ()))
    found = self.dataset.read(record, keys)
    if found.image is None:
      raise FeatureError(f"no image under {source.image_key}")
    small, width, height = decode.thumbnail(found.image, SIDE, self.limits)
    pixels = None if self.model is None else self.model.decode(found.image, self.limits)
    captions = (text for key in source.caption_keys for text in found.texts.get(key, ()))
    texts = [caption.decode(errors="replace") for caption in captions if caption.strip()]
    return _Facts(
      width,
      height,
      hashlib.blake2b(found.image, digest_size=_HASH_BYTES).digest(),
      perceptual_hash(small),
      pixels,
      texts if needs_text else [],
    )


def shards(dataset: Dataset) -> list[range]:
  """Return the records of each shard, or ranges of a fixed size for sources without shards."""
  sizes = counts(dataset.indexes)
  if not sizes:
    bounds = [*range(0, len(dataset), _SHARD), len(dataset)]
  else:
    bounds = list(itertools.accumulate(sizes, initial=0))
  return [range(first, stop) for first, stop in itertools.pairwise(bounds)]


def _check_model(
  dataset: Dataset, model: Embedder | None, likelihood: bool, heads: Mapping[str, LinearHead]
) -> None:
  """Raise ValueError if the model cannot compute the requested columns."""
  if model is None:
    if likelihood or heads:
      raise ValueError("caption likelihoods and linear heads require a model; give one")
    return
  if likelihood and not (model.can_caption and dataset.source.caption_keys):
    missing = "the source no captions" if model.can_caption else "the model no caption decoder"
    raise ValueError(f"{missing}: expected both for caption likelihoods; omit them")
  named = {field.name for field in dataclasses.fields(Rows)} | {annotations.LIKELIHOOD}
  for name, head in heads.items():
    if not name.isidentifier() or keyword.iskeyword(name) or name in named:
      raise ValueError(f"head {name!r}: expected a new column name of letters, digits and _")
    if len(head.weight) != model.dim:
      raise ValueError(
        f"head {name!r} has {len(head.weight)} weights, and embeddings of the model have "
        f"{model.dim} numbers; use the model for which it was trained"
      )


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
  info: annotations.Info,
  dataset: Dataset,
  batch_size: int,
  limits: decode.Limits,
  heads: Mapping[str, LinearHead],
) -> str:
  """Return 16 hex digits of everything that determines the files, except the image bytes."""
  source = dataset.source
  facts = {**dataclasses.asdict(info), "path": ""}  # the data may be moved
  content = [
    annotations.FORMAT, facts, batch_size if info.model else 0, dataclasses.asdict(limits),
    source.image_key, source.caption_keys,
    *([head.weight.tolist(), head.bias] for head in heads.values()),  # their names are columns
  ]  # fmt: skip
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
