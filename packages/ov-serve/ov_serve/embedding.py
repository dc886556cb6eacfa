"""Embed the images of a source into an index folder; resumable, and incremental for changed data.

The records are divided into parts of fixed size. A part is computed in fixed batches and written
atomically, so an interrupted run continues with the missing parts and produces the same bytes.
Images whose bytes were embedded before by the same model, under any name, are copied.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ov_data
from ov_data import decode, fs, output_lock
from ov_data.bad_records import BadRecords, Problem
from ov_data.example import FeatureError
from ov_serve import index as files
from ov_serve import merging, parts
from ov_serve.model import Model

Progress = Callable[[int, int], None]
_READ_AHEAD = 3  # batches that are read and decoded in advance


@dataclasses.dataclass(frozen=True)
class Summary:
  """Result of `embed`.

  Attributes:
    count: number of images in the index.
    embedded: number of images that the model embedded in this run.
    reused: number of images whose vectors were copied.
    bad: number of records without a vector, by reason.
    damaged: number of damaged parts, and of a damaged index, that this run set aside and replaced.
    recall_at_10: see `Info`.
    complete: whether the index is complete; False if other hosts are still embedding.
  """

  count: int
  embedded: int
  reused: int
  bad: Mapping[str, int]
  damaged: int = 0
  recall_at_10: float | None = None
  complete: bool = True


@dataclasses.dataclass
class _Row:
  entry: files.RecordEntry
  pixels: NDArray[np.uint8] | None  # None if the vector is known


def embed(
  model: Model,
  dataset: ov_data.Dataset,
  out: str | os.PathLike[str],
  *,
  model_folder: str | os.PathLike[str] = "",
  batch_size: int = 64,
  part_records: int = 2048,
  graph: bool | None = None,
  host: int = 0,
  hosts: int = 1,
  threads: int | None = None,
  limits: decode.Limits = decode.DEFAULT_LIMITS,
  max_bad_fraction: float = 0.1,
  progress: Progress | None = None,
) -> Summary:
  """Embed all images of a data set, or only the new and changed ones of an existing index.

  A damaged index or part is moved to a folder damaged-N of the index, and embedded again.

  Args:
    model: model.
    dataset: images, see `open_images`; captions under the caption keys of its source are stored
      with the vectors.
    out: folder of the index.
    model_folder: folder of the model, stored for later commands.
    batch_size: number of images per batch.
    part_records: number of records per part, the most that an interruption loses.
    graph: whether to build an HNSW graph; by default from 100,000 images on.
    host, hosts: index of this host and number of hosts that embed different parts into the same
      shared folder. The last one to finish writes the index.
    threads: number of threads that read and decode.
    limits: limits of encoded images.
    max_bad_fraction: fraction of unusable images above which the run stops.
    progress: called with (records done, records of this host).

  Raises:
    ValueError: if an argument is invalid, or another process computes the same parts.
    TooManyBadRecords: if too many images are unusable.
  """
  if batch_size < 1 or part_records < 1:
    raise ValueError(f"batch_size={batch_size}, part_records={part_records}: expected at least 1")
  if not 0 <= host < hosts:
    raise ValueError(f"host={host}, hosts={hosts}: expected 0 <= host < hosts")
  path = pathlib.Path(out)
  if path.exists() and not path.is_dir():
    raise ValueError(f"{path} is a file; expected a new folder, or the folder of an index")
  dataset.check_keys()
  recipe = _recipe(model, dataset, batch_size, part_records, limits)
  store = parts.Parts(path, recipe, model.fingerprint, model.dim)
  total = -(-len(dataset) // part_records)
  mine = range(host, total, hosts)
  of_host = sum(len(_records_of(part, part_records, dataset)) for part in mine)
  count: Counter[str] = Counter()

  def report(before: int, number: int) -> None:
    if progress:
      progress(before + number, of_host)

  with parts.locked(path):
    store.create()
    known = store.known()
  bad = BadRecords(max_bad_fraction, len(dataset))
  work = _Work(model, dataset, known, batch_size, limits, threads or _cores(), bad)
  # Each host locks only its own folder, so that several can write parts.
  with output_lock.locked(store.folder / f"host-{host}-of-{hosts}"):
    done = 0
    for part in mine:
      records = _records_of(part, part_records, dataset)
      if not store.is_complete(part):
        content = work.run(records, functools.partial(report, done), count)
        store.write(part, content)
      done += len(records)
      report(done, 0)
  with parts.locked(path):
    if store.folder.exists():
      if not all(store.file(part).exists() for part in range(total)):
        return Summary(0, count["embedded"], count["reused"], {}, store.damaged, complete=False)
      for part in range(total):  # those of other hosts may have been damaged since
        if part not in mine and not store.is_complete(part):
          content = work.run(_records_of(part, part_records, dataset), lambda _: None, count)
          store.write(part, content)
      found = [store.file(part) for part in range(total)]
      info = merging.merge(
        path, found, model, dataset, str(model_folder), recipe, graph, work.threads
      )
    else:  # another host has merged the parts in the meantime
      info = files.read_info(path)
  reasons = parts.reasons((path / info.errors.name).read_bytes())
  return Summary(
    info.count, count["embedded"], count["reused"], reasons, store.damaged, info.recall_at_10
  )


@dataclasses.dataclass(frozen=True)
class _Work:
  """Everything that computes a part."""

  model: Model
  dataset: ov_data.Dataset
  known: Mapping[str, NDArray[np.float16]]
  batch_size: int
  limits: decode.Limits
  threads: int
  bad: BadRecords

  def run(self, records: range, progress: Callable[[int], Any], count: Counter[str]) -> parts.Part:
    """Embed records, and add the numbers of embedded and reused images to `count`."""
    entries: list[files.RecordEntry] = []
    vectors: list[NDArray[np.float16]] = []
    failures: list[Problem] = []
    pending: list[_Row] = []  # rows in order; their pixels make at most one batch
    waiting = 0

    def flush() -> None:
      images = [row.pixels for row in pending if row.pixels is not None]
      new = iter(_rounded(self.model.embed_images(np.stack(images))) if images else ())
      for row in pending:
        known = row.pixels is None
        vectors.append(self.known[row.entry.hash] if known else next(new))
        entries.append(row.entry)
        count["reused" if known else "embedded"] += 1
      pending.clear()

    for number, (row, problems) in enumerate(self._rows(records), 1):
      self.bad.add(problems, 1)
      failures += problems
      if row is not None:
        pending.append(row)
        waiting += row.pixels is not None
      if waiting == self.batch_size:
        flush()
        waiting = 0
        progress(number)
    flush()
    return parts.Part(
      np.stack(vectors) if vectors else np.zeros((0, self.model.dim), np.float16),
      parts.lines(entries),
      parts.lines(parts.Failure(fs.printable(p.location), p.reason, p.detail) for p in failures),
    )

  def _rows(self, records: range) -> Iterator[tuple[_Row | None, list[Problem]]]:
    """Read and decode records in threads, in order, a few batches ahead."""
    ahead = _READ_AHEAD * self.batch_size
    with futures.ThreadPoolExecutor(self.threads, "ov-embed") as pool:
      tasks: deque[futures.Future[tuple[_Row | None, list[Problem]]]] = deque()
      try:
        for record in records:
          tasks.append(pool.submit(self._row, record))
          if len(tasks) > ahead:
            yield tasks.popleft().result()
        while tasks:
          yield tasks.popleft().result()
      finally:
        for task in tasks:
          task.cancel()

  def _row(self, record: int) -> tuple[_Row | None, list[Problem]]:
    problems: list[Problem] = []
    row = None
    with self.bad.catch(problems, lambda: self.dataset.location(record)):
      row = self._read(record)
    return row, problems

  def _read(self, record: int) -> _Row:
    source = self.dataset.source
    keys = (source.image_key, *source.caption_keys, "key", "class", "label")
    found = self.dataset.read(record, keys)
    if found.image is None:
      raise FeatureError(f"no image under {source.image_key}")
    captions = [text for key in source.caption_keys for text in found.texts.get(key, ())]
    labels, names = found.labels.get("label"), found.texts.get("class")
    entry = files.RecordEntry(
      record,
      self._key(record, found),
      hashlib.blake2b(found.image, digest_size=16).hexdigest(),
      list(dict.fromkeys(text.decode(errors="replace") for text in captions)),
      None if labels is None else int(labels[0]),
      names[0].decode(errors="replace") if names else None,
    )
    if entry.hash in self.known:
      return _Row(entry, None)
    return _Row(entry, self.model.decode(found.image, self.limits))

  def _key(self, record: int, found: ov_data.Record) -> str:
    """Return a printable name of the image without the folder of the collection."""
    if names := found.texts.get("key"):
      return fs.printable(names[0].decode("utf-8", "surrogateescape"))
    return fs.printable(fs.basename(self.dataset.location(record)))


def _rounded(vectors: NDArray[np.float32]) -> NDArray[np.float16]:
  """Round unit vectors to float16.

  Raises:
    ValueError: if a vector contains NaN or Inf.
  """
  if not np.isfinite(vectors).all():
    raise ValueError("the model returns NaN or Inf; its weights have diverged")
  return vectors.astype(np.float16)


def _records_of(part: int, size: int, dataset: ov_data.Dataset) -> range:
  return range(part * size, min((part + 1) * size, len(dataset)))


def _recipe(
  model: Model, dataset: ov_data.Dataset, batch: int, part: int, limits: decode.Limits
) -> str:
  """Return 16 hex digits of everything that determines the parts, except the image bytes."""
  source = dataset.source
  content = [
    files.FORMAT, model.fingerprint, dataset.fingerprint, len(dataset), batch, part,
    dataclasses.asdict(limits), source.image_key, source.caption_keys,
  ]  # fmt: skip
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
