"""Folder with the embeddings of a collection, and search in it.

    index.json         counts, checksums of all files, model, source; written last
    vectors-*.npy      unit vectors, float16 [N, E]
    records-*.jsonl    one JSON object per vector: record, key, hash of the image, captions, class
    errors-*.jsonl     records without a vector: location, reason, detail
    graph-*.usearch    HNSW graph of large collections

The files contain no pickle. A changed collection gets files with new names, and index.json is
replaced atomically, so readers and interrupted updates never see a mixture.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

import ov_data
from ov_data import fs
from ov_serve import search

INDEX = "index.json"
FORMAT = 1
_BLOCK = 1 << 20
_MAX_INDEX_BYTES = 1 << 20
_ROWS = 1 << 20  # upper bound of k


class FileEntry(msgspec.Struct, forbid_unknown_fields=True):
  """A file of an index: its name, size and SHA-256."""

  name: str
  bytes: int
  sha256: str


class ModelEntry(msgspec.Struct, forbid_unknown_fields=True):
  """The model of an index: its folder, and the fingerprint of its files."""

  folder: str
  fingerprint: str


class SourceEntry(msgspec.Struct, forbid_unknown_fields=True):
  """The fields of `ov_data.Source` that select the images of an index."""

  path: list[str]
  split: str | None = None
  image_key: str = "jpg"
  caption_keys: list[str] = []
  image_root: str | None = None
  format: str = "auto"
  follow_links: bool = False

  @property
  def source(self) -> ov_data.Source:
    """The source to open."""
    values = msgspec.structs.asdict(self)
    path = self.path[0] if len(self.path) == 1 else tuple(self.path)
    return ov_data.Source(**values | {"path": path, "caption_keys": tuple(self.caption_keys)})


class Info(msgspec.Struct, forbid_unknown_fields=True):
  """Content of index.json.

  Attributes:
    format: version of the format.
    count: number of vectors N.
    dim: size of the vectors E.
    bad: number of records without a vector.
    model: model of the vectors.
    source: source of the images.
    recipe: 16 hex digits of model, source and settings.
    vectors, records, errors, graph: files.
    recall_at_10: fraction of the ten nearest images that the graph finds; None without a graph.
  """

  format: int
  count: int
  dim: int
  bad: int
  model: ModelEntry
  source: SourceEntry
  recipe: str
  vectors: FileEntry
  records: FileEntry
  errors: FileEntry
  graph: FileEntry | None = None
  recall_at_10: float | None = None


class RecordEntry(msgspec.Struct, omit_defaults=True):
  """One line of records-*.jsonl.

  Attributes:
    record: number of the record in the source.
    key: name of the image: its path in the folder, or the location in a shard.
    hash: 32 hex digits of the encoded image (BLAKE2b).
    captions: captions of the image.
    label: class index, or None.
    class_name: class name, or None.
  """

  record: int
  key: str
  hash: str
  captions: list[str] = []
  label: int | None = None
  class_name: str | None = None


@dataclasses.dataclass(frozen=True)
class Hit:
  """An image found by a search: row of the index, and cosine similarity to the query."""

  row: int
  score: float


@dataclasses.dataclass(frozen=True)
class Index:
  """A complete index, read from memory-mapped files. Thread-safe.

  Attributes:
    folder: folder of the index.
    info: content of index.json.
  """

  folder: pathlib.Path
  info: Info

  @classmethod
  def open(cls, folder: str | os.PathLike[str], *, verify: bool = False) -> Self:
    """Open an index.

    Args:
      folder: folder that `ov_serve.embed` wrote.
      verify: whether to compare the checksums of all files, which reads them once.

    Raises:
      FileNotFoundError: if the folder has no complete index.
      ValueError: if a file is missing, damaged or of a later format.
    """
    path = pathlib.Path(folder)
    info = read_info(path)
    for entry in filter(None, (info.vectors, info.records, info.errors, info.graph)):
      _check_file(path, entry, verify)
    found = cls(path, info)
    shape = found.vectors.shape
    if shape != (info.count, info.dim) or len(found._offsets) != info.count:
      raise ValueError(
        f"{path}: index.json has {info.count} vectors of size {info.dim}, but the files have "
        f"{shape[0]} of {shape[1]} and {len(found._offsets)} records; embed the images again"
      )
    return found

  def __len__(self) -> int:
    return self.info.count

  @functools.cached_property
  def vectors(self) -> NDArray[np.float16]:
    """Unit vectors, float16 [N, E], memory-mapped."""
    file = self.folder / self.info.vectors.name
    try:
      array = np.load(file, mmap_mode="r" if self.info.count else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise ValueError(f"{file} is damaged: {error}; embed the images again") from None
    if array.dtype != np.float16 or array.ndim != 2:
      raise ValueError(
        f"{file} has {array.dtype} {list(array.shape)}; expected float16 [N, E]; embed again"
      )
    return array

  def record(self, row: int) -> RecordEntry:
    """Return the record of a row.

    Raises:
      IndexError: if there is no such row.
      ValueError: if the file of the records is damaged.
    """
    if not 0 <= row < self.info.count:
      raise IndexError(f"row={row}: the index has the rows 0 to {self.info.count - 1}")
    start = self._offsets[row]
    stop = self._offsets[row + 1] if row + 1 < self.info.count else None
    try:
      return msgspec.json.decode(bytes(self._records[start:stop]), type=RecordEntry)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
      file = self.folder / self.info.records.name
      raise ValueError(
        f"{file}, line {row + 1}, is damaged: {error}; embed the images again"
      ) from None

  def records(self) -> Iterator[RecordEntry]:
    """Yield the records of all rows."""
    for row in range(len(self)):
      yield self.record(row)

  def search(
    self,
    vectors: np.ndarray,
    k: int = 10,
    *,
    method: Literal["auto", "exact", "graph"] = "auto",
  ) -> list[list[Hit]]:
    """Return the k nearest images of each query, best first.

    Args:
      vectors: unit vectors float [Q, E].
      k: number of images; fewer if the index is smaller.
      method: "exact" compares with every vector, "graph" uses the HNSW graph, "auto" uses the graph
        if there is one.

    Raises:
      ValueError: if sizes do not match, k is not positive, or there is no graph.
    """
    queries = np.atleast_2d(vectors).astype(np.float16)
    if queries.shape[1] != self.info.dim:
      raise ValueError(
        f"the query has size {queries.shape[1]}, and the index {self.info.dim}; use the model of "
        "the index"
      )
    if not 1 <= k <= _ROWS:
      raise ValueError(f"k={k}: expected 1 to {_ROWS}")
    if method == "graph" and self.info.graph is None:
      raise ValueError(f"{self.folder} has no graph; embed with graph=True, or search exactly")
    k = min(k, len(self))
    if not k:
      return [[] for _ in queries]
    if self.info.graph is None or method == "exact":
      found = search.exact(self.vectors, queries, k)
    else:
      found = search.with_graph(self._graph, queries, k)
    return [
      [Hit(int(row), float(score)) for row, score in zip(*pair, strict=True)]
      for pair in zip(*found, strict=True)
    ]

  @functools.cached_property
  def _graph(self) -> Any:
    assert self.info.graph is not None
    return search.load_graph(self.folder / self.info.graph.name, len(self), self.info.dim)

  @functools.cached_property
  def _records(self) -> NDArray[np.uint8]:
    file = self.folder / self.info.records.name
    if not self.info.records.bytes:
      return np.zeros(0, np.uint8)
    return np.memmap(file, np.uint8, "r")

  @functools.cached_property
  def _offsets(self) -> NDArray[np.int64]:
    """First byte of each line of the records."""
    ends = np.flatnonzero(self._records == ord("\n")).astype(np.int64)
    return np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends


def read_info(folder: pathlib.Path) -> Info:
  """Read index.json.

  Raises:
    FileNotFoundError: if it does not exist.
    ValueError: if it is damaged or of a later format.
  """
  file = folder / INDEX
  if not file.is_file():
    unfinished = any(folder.glob("parts-*"))
    remedy = "give the embed command again to finish it" if unfinished else "embed images first"
    state = "an unfinished index" if unfinished else "no index"
    raise FileNotFoundError(f"{folder} holds {state}: {INDEX} is missing; {remedy}")
  if (size := file.stat().st_size) > _MAX_INDEX_BYTES:
    raise ValueError(f"{file} has {size} bytes; expected at most {_MAX_INDEX_BYTES}")
  try:
    content = msgspec.json.decode(file.read_bytes())
    version = content["format"]
    if isinstance(version, int) and version > FORMAT:
      raise ValueError(f"format {version}; this version reads up to {FORMAT}")
    checksum = content.pop("sha256")
    info = msgspec.convert(content, Info)
    if hashlib.sha256(msgspec.json.encode(info)).hexdigest() != checksum:
      raise ValueError("its checksum differs")
    return info
  except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} cannot be read: {error}; embed the images again") from None


def write_info(folder: pathlib.Path, info: Info) -> None:
  """Replace index.json atomically; "sha256" is the checksum of its other fields."""
  checksum = hashlib.sha256(msgspec.json.encode(info)).hexdigest()
  content = msgspec.json.encode(msgspec.to_builtins(info) | {"sha256": checksum})
  fs.write_atomic(str(folder / INDEX), msgspec.json.format(content, indent=2) + b"\n")


def file_entry(file: pathlib.Path) -> FileEntry:
  """Return name, size and checksum of a file."""
  return FileEntry(file.name, file.stat().st_size, _sha256(file))


def files_of(info: Info) -> set[str]:
  """Return the names of the files of an index."""
  entries: Sequence[FileEntry | None] = (info.vectors, info.records, info.errors, info.graph)
  return {entry.name for entry in entries if entry is not None}


def _check_file(folder: pathlib.Path, entry: FileEntry, verify: bool) -> None:
  if pathlib.PurePath(entry.name).name != entry.name or entry.name in ("", ".", ".."):
    raise ValueError(f"{folder / INDEX} names the file {entry.name!r}; expected a plain name")
  file = folder / entry.name
  if not file.is_file():
    raise ValueError(f"{file} is missing; embed the images again")
  if (size := file.stat().st_size) != entry.bytes:
    raise ValueError(f"{file} has {size} bytes, not {entry.bytes}; embed the images again")
  if verify and _sha256(file) != entry.sha256:
    raise ValueError(f"{file} is damaged: its checksum differs; embed the images again")


def _sha256(file: pathlib.Path) -> str:
  digest = hashlib.sha256()
  with open(file, "rb") as handle:
    while block := handle.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()
