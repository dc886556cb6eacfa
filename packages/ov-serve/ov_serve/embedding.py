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
import io
import json
import logging
import os
import pathlib
import shutil
from typing import Any
import zipfile

import msgspec
import numpy as np
from numpy.typing import NDArray

import ov_data
from ov_data import decode, fs, output_lock
from ov_data.bad_records import BadRecords, Problem
from ov_data.example import FeatureError
from ov_serve import index as files
from ov_serve import search
from ov_serve.model import Model

log = logging.getLogger("ov_serve")

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
    recall_at_10: see `Info`.
    complete: whether the index is complete; False if other hosts are still embedding.
  """

  count: int
  embedded: int
  reused: int
  bad: Mapping[str, int]
  recall_at_10: float | None = None
  complete: bool = True


class _Failure(msgspec.Struct):
  """One line of errors-*.jsonl."""

  location: str
  reason: str
  detail: str


@dataclasses.dataclass
class _Row:
  entry: files.RecordEntry
  pixels: NDArray[np.uint8] | None  # None if the vector is known


def embed(
  model: Model,
  source: ov_data.Source,
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
  """Embed all images of a source, or only the new and changed ones of an existing index.

  Args:
    model: model.
    source: source of the images; captions under its caption keys are stored with the vectors.
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
    ValueError: if an argument is invalid, the source cannot be opened, or another process writes to
      the folder.
    TooManyBadRecords: if too many images are unusable.
  """
  if batch_size < 1 or part_records < 1:
    raise ValueError(f"batch_size={batch_size}, part_records={part_records}: expected at least 1")
  if not 0 <= host < hosts:
    raise ValueError(f"host={host}, hosts={hosts}: expected 0 <= host < hosts")
  path = pathlib.Path(out)
  dataset = ov_data.Dataset(source)
  dataset.check_keys()
  recipe = _recipe(model, dataset, batch_size, part_records, limits)
  parts = path / f"parts-{recipe}"
  fs.make_folder(str(parts))
  total = -(-len(dataset) // part_records)
  mine = range(host, total, hosts)
  of_host = sum(len(_records_of(part, part_records, dataset)) for part in mine)
  count: Counter[str] = Counter()
  # Each host locks only its own folder, so that several can write parts.

  def report(before: int, number: int) -> None:
    if progress:
      progress(before + number, of_host)

  with output_lock.locked(parts / f"host-{host}-of-{hosts}"):
    work = _Work(
      model, dataset, _known(path, model, recipe), batch_size, limits, threads or _cores(),
      BadRecords(max_bad_fraction, len(dataset)),
    )  # fmt: skip
    done = 0
    for part in mine:
      records = _records_of(part, part_records, dataset)
      file = parts / f"{part:06}.npz"
      if not file.exists():
        count += work.write(file, records, functools.partial(report, done))
      done += len(records)
      report(done, 0)
  found = [parts / f"{part:06}.npz" for part in range(total)]
  if not all(file.exists() for file in found):
    return Summary(0, count["embedded"], count["reused"], {}, complete=False)
  with output_lock.locked(path):
    info, bad = _merge(path, found, model, dataset, str(model_folder), recipe, graph)
  return Summary(info.count, count["embedded"], count["reused"], bad, info.recall_at_10)


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

  def write(
    self, file: pathlib.Path, records: range, progress: Callable[[int], Any]
  ) -> Counter[str]:
    """Embed records and write their part atomically; return the numbers of images."""
    entries: list[files.RecordEntry] = []
    vectors: list[NDArray[np.float16]] = []
    failures: list[Problem] = []
    count: Counter[str] = Counter()
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
    lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
    reports = [_Failure(fs.printable(p.location), p.reason, p.detail) for p in failures]
    _write_atomic(
      file,
      vectors=np.stack(vectors) if vectors else np.zeros((0, self.model.dim), np.float16),
      records=np.frombuffer(lines, np.uint8),
      errors=np.frombuffer(
        b"".join(msgspec.json.encode(failure) + b"\n" for failure in reports), np.uint8
      ),
    )
    return count

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


def _known(path: pathlib.Path, model: Model, recipe: str) -> dict[str, NDArray[np.float16]]:
  """Return vectors of the same model by hash, from the index and parts of other recipes."""
  known: dict[str, NDArray[np.float16]] = {}
  if (path / files.INDEX).exists():
    try:
      old = files.Index.open(path)
    except ValueError as error:
      log.warning("%s; no vector is reused", error)
    else:
      if old.info.model.fingerprint == model.fingerprint:
        known = {entry.hash: old.vectors[row] for row, entry in enumerate(old.records())}
  for folder in sorted(path.glob("parts-*")):
    if folder.name != f"parts-{recipe}" and _owner(folder) == model.fingerprint:
      for file in sorted(folder.glob("*.npz")):
        vectors, lines, _ = _read_part(file)
        known |= zip((entry.hash for entry in _entries(lines)), vectors)
  owner = path / f"parts-{recipe}" / _OWNER
  if not owner.exists():
    fs.write_atomic(str(owner), model.fingerprint.encode())
  return known


_OWNER = "model.txt"  # fingerprint of the model of a folder of parts


def _owner(folder: pathlib.Path) -> str:
  file = folder / _OWNER
  return file.read_text("utf-8") if file.exists() else ""


def _entries(lines: bytes) -> list[files.RecordEntry]:
  return [msgspec.json.decode(line, type=files.RecordEntry) for line in lines.splitlines()]


def _read_part(file: pathlib.Path) -> tuple[NDArray[np.float16], bytes, bytes]:
  """Return the vectors, records and errors of a part.

  Raises:
    ValueError: if the file is damaged.
  """
  try:
    with np.load(file, allow_pickle=False) as part:
      return part["vectors"], part["records"].tobytes(), part["errors"].tobytes()
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{file} is damaged: {error}; delete it and embed again") from None


def _write_atomic(file: pathlib.Path, **arrays: NDArray[Any]) -> None:
  content = io.BytesIO()
  np.savez(content, allow_pickle=False, **arrays)
  part = file.with_suffix(".part")
  with fs.writing(str(file)):
    with open(part, "wb") as handle:
      handle.write(content.getbuffer())
      handle.flush()
      os.fsync(handle.fileno())
    os.replace(part, file)


def _merge(
  path: pathlib.Path,
  parts: list[pathlib.Path],
  model: Model,
  dataset: ov_data.Dataset,
  model_folder: str,
  recipe: str,
  graph: bool | None,
) -> tuple[files.Info, Counter[str]]:
  """Join the parts, write index.json, and delete parts and files of earlier indexes."""
  sizes = [len(_read_part(part)[0]) for part in parts]
  has_graph = bool(graph) if graph is not None else sum(sizes) >= search.GRAPH_FROM
  has_graph = has_graph and sum(sizes) > 0
  digest = hashlib.sha256(f"{recipe} {has_graph}".encode() + _skips(dataset))
  for part in parts:
    digest.update(hashlib.sha256(part.read_bytes()).digest())
  end = digest.hexdigest()[:16]
  names = {"vectors": "npy", "records": "jsonl", "errors": "jsonl", "graph": "usearch"}
  paths = {name: path / f"{name}-{end}.{suffix}" for name, suffix in names.items()}
  if (path / files.INDEX).exists():
    info = files.read_info(path)
    if info.vectors.name == paths["vectors"].name:  # nothing changed; readers may map these files
      _delete_others(path, info)
      return info, _reasons((path / info.errors.name).read_bytes())
  failures = b"".join([*(_read_part(part)[2] for part in parts), _skips(dataset)])
  paths["errors"].write_bytes(failures)
  shape = (sum(sizes), model.dim)
  vectors: Any = np.lib.format.open_memmap(paths["vectors"], "w+", np.float16, shape)
  with fs.writing(str(path)), open(paths["records"], "wb") as records:
    row = 0
    for part, size in zip(parts, sizes, strict=True):
      vectors[row : row + size], lines, _ = _read_part(part)
      records.write(lines)
      row += size
    vectors.flush()
  recall = None
  if has_graph:
    built = search.build_graph(vectors, threads=_cores())
    built.save(str(paths["graph"]))
    recall = search.recall(built, vectors)
  bad = _reasons(failures)
  info = _info(paths, model, dataset, model_folder, recipe, len(vectors), bad, recall)
  files.write_info(path, info)
  _delete_others(path, info)
  return info, bad


def _skips(dataset: ov_data.Dataset) -> bytes:
  """Return the inputs without a record, one JSON object per line."""
  found = (_Failure(fs.printable(s.key), s.reason, s.detail) for s in dataset.skips)
  return b"".join(msgspec.json.encode(failure) + b"\n" for failure in found)


def _reasons(lines: bytes) -> Counter[str]:
  return Counter(msgspec.json.decode(line, type=_Failure).reason for line in lines.splitlines())


def _info(
  paths: Mapping[str, pathlib.Path],
  model: Model,
  dataset: ov_data.Dataset,
  model_folder: str,
  recipe: str,
  count: int,
  bad: Counter[str],
  recall: float | None,
) -> files.Info:
  source = dataset.source
  return files.Info(
    format=files.FORMAT,
    count=count,
    dim=model.dim,
    bad=sum(bad.values()),
    model=files.ModelEntry(
      os.path.abspath(model_folder) if model_folder else "", model.fingerprint
    ),
    source=files.SourceEntry(
      path=[_absolute(path) for path in source.paths],
      split=source.split,
      image_key=source.image_key,
      caption_keys=[*source.caption_keys],
      image_root=source.image_root and _absolute(source.image_root),
      format=source.format,
      follow_links=source.follow_links,
    ),
    recipe=recipe,
    vectors=files.file_entry(paths["vectors"]),
    records=files.file_entry(paths["records"]),
    errors=files.file_entry(paths["errors"]),
    graph=None if recall is None else files.file_entry(paths["graph"]),
    recall_at_10=recall,
  )


def _absolute(path: str) -> str:
  return path if fs.is_remote(path) else os.path.abspath(path)


def _delete_others(path: pathlib.Path, info: files.Info) -> None:
  """Delete all parts, and files that index.json does not name."""
  for folder in path.glob("parts-*"):
    shutil.rmtree(folder)
  kept = files.files_of(info)
  for pattern in ("vectors-*.npy", "records-*.jsonl", "errors-*.jsonl", "graph-*.usearch"):
    for file in path.glob(pattern):
      if file.name not in kept:
        file.unlink()


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
