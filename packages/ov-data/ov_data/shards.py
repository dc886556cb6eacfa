"""TFRecord shards as one numbered list of records: found by name, indexed, sliced, read."""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent import futures
import dataclasses
import functools
import itertools
import threading

from ov_data import example, fs, manifest, records
from ov_data.example import Feature, FeatureError
from ov_data.index import Damage, Progress, ShardIndex, load_indexes
from ov_data.manifest import TFDS_INFO
from ov_data.record_source import Skip
from ov_data.shard_names import find_shards, is_shard
from ov_data.splits import Split

__all__ = ["TFDS_INFO", "Shards", "find_shards", "is_shard"]

_OPEN_FILES = 256


class Shards:
  """The records of shards, numbered 0 to len - 1 in the order of shards and of bytes in them.

  Args:
    paths: where they are, see `find_shards`; or one directory of TensorFlow Datasets.
    split: which of them.
    progress: is told of the indexing, (bytes done, bytes in all).
    run: with more than 1, records are fetched as runs of that many neighbours, in one read each,
      and the last `cached_runs` runs are kept.

  Raises:
    ValueError: no shards, missing shards, an unknown split, not one usable record, or other numbers
      of records than in the manifest of the shards, see `ov_data.manifest`.
    OSError: a shard is no regular file, or cannot be read.
  """

  def __init__(
    self,
    paths: Sequence[str],
    split: Split,
    progress: Progress | None = None,
    run: int = 1,
    cached_runs: int = 64,
  ):
    if not all(paths) or not paths:
      raise ValueError(f"path={paths!r} is empty; name a folder, a file or a glob")
    for path in paths:
      fs.check_name(path)
    if len(paths) == 1 and manifest.is_tfds(paths[0]):
      indexes = _open_tfds(paths[0], split.name, progress)
    else:
      shards = [shard for path in paths for shard in find_shards(path, split.name)]
      indexes = load_indexes(shards, progress)
    lost = manifest.check_counts(indexes)
    _check_usable([index for index in indexes if index.path not in lost], indexes, paths)
    self._skips = [skip for index in indexes for skip in _skips(index, lost.get(index.path, 0))]
    self.indexes = _cut(indexes, split) if split.slices else indexes
    self._firsts = list(itertools.accumulate(map(len, self.indexes), initial=0))
    self._reader = functools.lru_cache(_OPEN_FILES)(fs.Reader)
    self._run = run
    self._runs: _Cache = _Cache(self._read_run, cached_runs)

  def __len__(self) -> int:
    return self._firsts[-1]

  @property
  def class_names(self) -> None:
    """None: shards carry no list of classes."""
    return None

  @property
  def skips(self) -> Sequence[Skip]:
    """The records that are damaged, over all opened shards."""
    return self._skips

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits of shard names, sizes, edge checksums and record counts; not of the place."""
    return manifest.fingerprint(self.indexes)

  def locate(self, record: int) -> tuple[str, int]:
    """The shard that holds a record, and the offset of the record's data in it."""
    index, number = self._place(record)
    return index.path, int(index.offsets[number])

  def read(self, record: int) -> bytes:
    """The data of a record, its checksums verified. Safe to call from many threads.

    Raises:
      records.RecordError: the bytes have changed since they were indexed.
      OSError: the shard cannot be read.
    """
    path, offset = self.locate(record)
    if self._run > 1:
      framed = self._runs.get(record // self._run)[record % self._run]
    else:
      framed = self._read_framed(*self._place(record))
    return records.unframe(framed, offset - records.HEADER_BYTES)

  def features(self, record: int, keys: Collection[str] | None = None) -> dict[str, Feature]:
    """Read a record; see `RecordSource.features`."""
    data = self.read(record)
    try:
      return example.parse(data, keys)
    except ValueError:
      raise FeatureError("not a tf.train.Example") from None

  def _place(self, record: int) -> tuple[ShardIndex, int]:
    shard = bisect.bisect_right(self._firsts, record) - 1
    return self.indexes[shard], record - self._firsts[shard]

  def _read_framed(self, index: ShardIndex, number: int) -> bytes:
    start = int(index.offsets[number]) - records.HEADER_BYTES
    size = records.HEADER_BYTES + int(index.lengths[number]) + records.FOOTER_BYTES
    return self._reader(index.path).read(start, size)

  def _read_run(self, run: int) -> list[bytes]:
    """The framed records of a run: one read for each shard that it touches."""
    framed: list[bytes] = []
    record, stop = run * self._run, min((run + 1) * self._run, len(self))
    while record < stop:
      index, number = self._place(record)
      last = min(len(index), number + stop - record)
      offsets = index.offsets[number:last].astype(int) - records.HEADER_BYTES
      ends = offsets + index.lengths[number:last] + records.HEADER_BYTES + records.FOOTER_BYTES
      data = self._reader(index.path).read(int(offsets[0]), int(ends[-1] - offsets[0]))
      framed += [data[a:b] for a, b in zip(offsets - offsets[0], ends - offsets[0])]
      record += last - number
    return framed


def _check_usable(
  uncounted: Sequence[ShardIndex], indexes: Sequence[ShardIndex], paths: Sequence[str]
) -> None:
  """Raise ValueError where a shard is no TFRecord file, or none holds a record.

  Args:
    uncounted: the shards whose damage no manifest explains.
    indexes: all shards.
    paths: of the source.
  """
  bad = [i for i in uncounted if not len(i) and any(d.records is None for d in i.damage)]
  if any(map(len, indexes)) and not bad:
    return
  damaged = bad or [index for index in indexes if index.damage]
  problem = f"no usable record in the {len(indexes)} shard(s) of {', '.join(paths)}"
  if any(map(len, indexes)):
    problem = f"{len(bad)} of {len(indexes)} shards have no usable record"
  if not damaged:
    raise ValueError(f"{problem}; they are empty. Copy or write them again")
  first = damaged[0].damage[0]
  remedy = "Are they TFRecord files? Copy or write them again"
  if first.reason.endswith("compressed shard"):
    remedy = "Uncompress them (gunzip, zlib-flate -uncompress, unzstd)"
  elif first.reason == "Git LFS pointer":
    remedy = "Fetch the files with git lfs pull"
  if any(map(len, indexes)):
    remedy += ", or leave them out with a glob"
  raise ValueError(
    f"{problem}; first damage: {damaged[0].path} at byte {first.offset}: {first.reason}. {remedy}"
  )


def _skips(index: ShardIndex, lost: int) -> list[Skip]:
  """Return one `Skip` for each damaged record of a shard.

  Args:
    index: of the shard.
    lost: number of its records that are damaged, if a manifest tells; stretches of damage with an
      unknown number of records share those that are left, the longest has the rest.
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


def _open_tfds(path: str, split: str | None, progress: Progress | None) -> list[ShardIndex]:
  """Open a directory of TensorFlow Datasets: its own table says which records make a split."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(
      f"{path} is a TensorFlow Datasets directory, and that library is missing ({error}); "
      "pip install 'ov-data[tensorflow]', or name its shards with a glob"
    ) from None
  try:
    info = tfds.builder_from_directory(path).info
    splits, file_format = info.splits, getattr(info.file_format, "value", "tfrecord")
  except Exception as error:  # of protobuf, etils and TensorFlow, none of them a ValueError
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{path} cannot be opened as a TensorFlow Datasets directory ({type(error).__name__}: "
      f"{reason}); copy {TFDS_INFO} and features.json again, or name its shards with a glob"
    ) from error
  if file_format != "tfrecord":
    raise ValueError(
      f"{path} holds {file_format} files; expected TFRecord. Write the data set with "
      "file_format='tfrecord'"
    )
  if split is None and len(splits) == 1:
    split = next(iter(splits))
  if split not in splits:
    raise ValueError(f"{path} has the splits {', '.join(splits)}; split={split!r} is none of them")
  return load_indexes([str(part.filename) for part in splits[split].file_instructions], progress)


def _cut(indexes: Sequence[ShardIndex], split: Split) -> list[ShardIndex]:
  """What the slices leave, counted over all shards."""
  kept = split.range(sum(map(len, indexes)))
  parts: list[ShardIndex] = []
  first = 0
  for index in indexes:
    part = slice(max(0, kept.start - first), max(0, kept.stop - first))
    parts.append(
      dataclasses.replace(index, offsets=index.offsets[part], lengths=index.lengths[part])
    )
    first += len(index)
  return [part for part in parts if len(part)]


class _Cache:
  """The last few values of a slow function; threads that want the same one wait for one call."""

  def __init__(self, load: Callable[[int], list[bytes]], capacity: int):
    self._load = load
    self._capacity = capacity
    self._values: OrderedDict[int, futures.Future[list[bytes]]] = OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: int) -> list[bytes]:
    with self._lock:
      value = self._values.get(key)
      mine = value is None
      if value is None:
        value = self._values[key] = futures.Future()
        while len(self._values) > self._capacity:
          self._values.popitem(last=False)
      self._values.move_to_end(key)
    if mine:
      try:
        value.set_result(self._load(key))
      except BaseException as error:
        with self._lock:
          self._values.pop(key, None)
        value.set_exception(error)
    return value.result()
