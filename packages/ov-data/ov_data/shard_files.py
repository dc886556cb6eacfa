"""Base of the record sources over shards: files that hold many records each."""

import abc
import array
import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent import futures
import functools
import itertools
import logging
import threading
from typing import Any, ClassVar, NamedTuple

from ov_data import fs, manifest
from ov_data.index import (
  Columns,
  Damage,
  ShardIndex,
  ShardKind,
  counts,
  damaged,
  load_index,
  load_indexes,
)
from ov_data.record_source import Record, RecordSource, Skip
from ov_data.request import Request
from ov_data.shard_names import find_shards
from ov_data.splits import Split

_OPEN_FILES = 256
_MAX_GAP = 8  # dropped records in a row that are read along, to save a request

log = logging.getLogger("ov_data")


class Raw(NamedTuple):
  """Bytes of a record.

  Attributes:
    offset: offset of the record's data in the shard in bytes.
    checksum: checksum of the headers in the index; 0 if the format stores checksums itself.
    data: bytes of the record with its framing.
  """

  offset: int
  checksum: int
  data: bytes


class ShardFiles(RecordSource):
  """The records of shards in the order of the sorted shards.

  A subclass sets `kind` and implements `read`.

  Args:
    request: request with the path, see `find_shards`, and the read options.
    files: paths of the shards; None finds them.

  Raises:
    ValueError: if there are no shards, shards are missing, the split is unknown, no record is
      usable, or record counts differ from the manifest, see `ov_data.manifest`.
    OSError: if a shard is not a regular file or cannot be read.
  """

  kind: ClassVar[ShardKind]

  def __init__(self, request: Request, files: Sequence[str] | None = None):
    paths, split = request.source.paths, request.split
    if not all(paths) or not paths:
      raise ValueError(f"path={paths!r} is empty; name a folder, a file or a glob")
    for path in paths:
      fs.check_name(path)
    if files is None:
      files = [shard for path in paths for shard in find_shards(path, split.name, self.kind)]
    indexes = load_indexes(files, request.progress, self.kind)
    lost = manifest.check_counts(indexes)
    _check_usable(indexes, lost, paths, self.kind)
    self.skips = [s for index in damaged(indexes) for s in _skips(index, lost.get(index.path, 0))]
    self.indexes = _cut(indexes, split) if split.slices else indexes
    self._firsts = array.array("q", itertools.accumulate(counts(self.indexes), initial=0))
    self._reader = functools.lru_cache(_OPEN_FILES)(fs.Reader)
    self._image_key = request.source.image_key

  def __len__(self) -> int:
    return self._firsts[-1]

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits of shard names, sizes, edge checksums and record counts, not of the path."""
    return manifest.fingerprint(self.indexes)

  def locate(self, record: int) -> tuple[str, int]:
    """Return the shard of a record and the offset of the record's data in it."""
    shard, number = self._place(record)
    offsets = self._positions(shard, number, number + 1).offsets
    return self.indexes[shard].path, int(offsets[0])

  def _place(self, record: int) -> tuple[int, int]:
    """Return the shard of a record, and the record's number in it."""
    shard = bisect.bisect_right(self._firsts, record) - 1
    return shard, record - self._firsts[shard]

  def _positions(self, shard: int, first: int, stop: int) -> Columns:
    """Return the positions of the records [first, stop) of a shard."""
    index = self.indexes[shard]
    try:
      return index.positions(first, stop, self._reader)
    except FileNotFoundError:
      log.warning("the index %s was removed and is rebuilt", index.sidecar)
    again = load_index(index.path, self.kind)
    if (again.fingerprint, len(again)) != (index.fingerprint, index.total):
      raise ValueError(f"{index.path} changed after it was opened; restart the run")
    self._reader.cache_clear()
    return again.part(index.first, index.first + len(index)).positions(first, stop, self._reader)


class ShardRuns(ShardFiles):
  """Shards in which runs of consecutive records are read at once, for shuffle="block".

  A subclass implements `_parse`. Formats without positions in the index also override `_fetch` and
  `locate`.
  """

  def __init__(self, request: Request, files: Sequence[str] | None = None):
    super().__init__(request, files)
    self._run, self._keep = request.run, request.keep
    self._runs = Cache(self._read_run, request.cached_runs)

  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a record; see `RecordSource.read`."""
    return self._parse(self._raw(record), keys)

  @abc.abstractmethod
  def _parse(self, raw: Any, keys: Collection[str] | None) -> Record:
    """Return the record of the bytes that `_fetch` returned."""

  def _fetch(self, shard: int, first: int, stop: int) -> list[Any]:
    """Read the records [first, stop) of a shard at once."""
    found = self._positions(shard, first, stop)
    starts = found.offsets.astype(int) - self.kind.before
    ends = found.offsets.astype(int) + found.lengths + self.kind.after
    origin = int(starts[0])
    data = self._reader(self.indexes[shard].path).read(origin, int(ends[-1]) - origin)
    checksums = [0] * len(found) if found.checksums is None else found.checksums.tolist()
    return [
      Raw(offset, checksum, data[start - origin : end - origin])
      for offset, checksum, start, end in zip(
        found.offsets.tolist(), checksums, starts.tolist(), ends.tolist(), strict=True
      )
    ]

  def _raw(self, record: int) -> Any:
    if self._run > 1:
      run, row = divmod(record if self._keep is None else self._keep.rank(record), self._run)
      return self._runs.get(run)[row]
    shard, number = self._place(record)
    return self._fetch(shard, number, number + 1)[0]

  def _read_run(self, run: int) -> list[Any]:
    """Return the bytes of the records of a run, with one read per shard and range."""
    keep = self._keep
    if keep is None:
      return self._read_range(run * self._run, min((run + 1) * self._run, len(self)))
    numbers = range(run * self._run, min((run + 1) * self._run, len(keep)))
    records = [keep[number] for number in numbers]
    found: list[Any] = []
    first = 0
    for end in range(1, len(records) + 1):
      if end == len(records) or records[end] - records[end - 1] > _MAX_GAP + 1:
        start = records[first]
        data = self._read_range(start, records[end - 1] + 1)
        found += [data[record - start] for record in records[first:end]]
        first = end
    return found

  def _read_range(self, record: int, stop: int) -> list[Any]:
    """Return the bytes of the records [record, stop), with one read per shard."""
    found: list[Any] = []
    while record < stop:
      shard, number = self._place(record)
      last = min(len(self.indexes[shard]), number + stop - record)
      found += self._fetch(shard, number, last)
      record += last - number
    return found


def _check_usable(
  indexes: Sequence[ShardIndex],
  lost: Collection[str],
  paths: Sequence[str],
  kind: ShardKind,
) -> None:
  """Raise ValueError if a shard has another format, or no shard holds a record.

  Args:
    indexes: indexes of all shards.
    lost: shards whose damage is explained by a manifest.
    paths: paths of the source.
    kind: format of the shards.
  """
  affected = damaged(indexes)
  bad = [
    index
    for index in affected
    if not len(index)
    and index.path not in lost
    and any(item.records is None for item in index.damage)
  ]
  has_records = any(counts(indexes))
  if has_records and not bad:
    return
  problem = f"no usable record in the {len(indexes)} shard(s) of {', '.join(paths)}"
  if has_records:
    problem = f"{len(bad)} of {len(indexes)} shards have no usable record"
  if not affected:
    raise ValueError(f"{problem}; they are empty. Copy or write them again")
  worst = (bad or affected)[0]
  first = worst.damage[0]
  remedy = f"Are they {kind.name} files? If so, copy or write them again"
  if first.reason.endswith("compressed shard"):
    remedy = "Decompress them (gunzip, zlib-flate -uncompress, unzstd)"
  elif first.reason == "Git LFS pointer":
    remedy = "Fetch the files with git lfs pull"
  if has_records:
    remedy += ", or exclude them with a glob"
  raise ValueError(
    f"{problem}; first damage: {worst.path} at byte {first.offset}: {first.reason}. {remedy}"
  )


def _skips(index: ShardIndex, lost: int) -> list[Skip]:
  """Return a `Skip` for each damaged record of a shard.

  Args:
    index: index of the shard.
    lost: number of damaged records according to the manifest, if known. They are distributed over
      the damaged ranges with unknown record count; the longest range receives the remainder.
  """
  counts = [item.records or 1 for item in index.damage]
  unknown = [number for number, item in enumerate(index.damage) if item.records is None]
  if unknown and lost > sum(counts):
    longest = max(unknown, key=lambda number: index.damage[number].length)
    counts[longest] += lost - sum(counts)
  return [
    Skip(f"{index.path} at byte {item.offset}", item.reason, _detail(item, count))
    for item, count in zip(index.damage, counts)
    for _ in range(count)
  ]


def _detail(damage: Damage, count: int) -> str:
  records_text = "1 record" if count == 1 else f"{count} records"
  return f"{records_text} in bytes {damage.offset} to {damage.offset + damage.length}"


def _cut(indexes: Sequence[ShardIndex], split: Split) -> list[ShardIndex]:
  """Return the indexes restricted to the slices of the split, counted over all shards."""
  kept = split.range(sum(counts(indexes)))
  parts: list[ShardIndex] = []
  first = 0
  for index in indexes:
    start, stop = max(0, kept.start - first), min(len(index), kept.stop - first)
    if start < stop:
      parts.append(index.part(start, stop))
    first += len(index)
  return parts


class Cache:
  """Thread-safe LRU cache of a slow function; concurrent requests for a key share one call."""

  def __init__(self, load: Callable[[Any], list[Any]], capacity: int):
    self._load = load
    self._capacity = capacity
    self._values: OrderedDict[Hashable, futures.Future[list[Any]]] = OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: Hashable) -> list[Any]:
    with self._lock:
      value = self._values.get(key)
      is_owner = value is None
      if value is None:
        value = self._values[key] = futures.Future()
        while len(self._values) > self._capacity:
          self._values.popitem(last=False)
      self._values.move_to_end(key)
    if is_owner:
      try:
        value.set_result(self._load(key))
      except BaseException as error:
        with self._lock:
          self._values.pop(key, None)
        value.set_exception(error)
    return value.result()
