"""TFRecord shards as one numbered list of records: found by name, indexed, sliced, read."""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import threading

from ov_data import example, fs, records
from ov_data.example import Feature, FeatureError
from ov_data.index import Progress, ShardIndex, load_indexes
from ov_data.record_source import Skip
from ov_data.splits import Split

_NUMBERED = re.compile(r"(?P<stem>.*?)[-.](?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<rest>.*)")
_IS_SHARD = re.compile(r".*\.tfrec(ord)?s?([-.].*)?")
_NOT_SHARD = (".ovidx", ".part", ".json", ".txt", ".tmp")
_OPEN_FILES = 256
TFDS_INFO = "dataset_info.json"  # in every directory of TensorFlow Datasets


class Shards:
  """The records of shards, numbered 0 to len - 1 in the order of shards and of bytes in them.

  Args:
    paths: where they are, see `find_shards`; or one directory of TensorFlow Datasets.
    split: which of them.
    progress: is told of the indexing, (bytes done, bytes in all).
    run: with more than 1, records are fetched as runs of that many neighbours, in one read each,
      and the last `cached_runs` runs are kept.

  Raises:
    ValueError: no shards, missing shards, an unknown split, or not one usable record.
  """

  def __init__(
    self,
    paths: Sequence[str],
    split: Split,
    progress: Progress | None = None,
    run: int = 1,
    cached_runs: int = 64,
  ):
    if len(paths) == 1 and fs.exists(fs.join(paths[0], TFDS_INFO)):
      indexes = _open_tfds(paths[0], split.name, progress)
    else:
      shards = [shard for path in paths for shard in find_shards(path, split.name)]
      indexes = load_indexes(shards, progress)
    if not any(map(len, indexes)):
      damage = [f"{i.path} at byte {at}: {why}" for i in indexes for at, why in i.damage]
      raise ValueError(
        f"no usable record in the {len(indexes)} shard(s) of {', '.join(paths)}; "
        + (f"first damage: {damage[0]}" if damage else "they are empty")
      )
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
  def skips(self) -> list[Skip]:
    """The damaged stretches of the shards."""
    return [Skip(f"{i.path} at byte {at}", why) for i in self.indexes for at, why in i.damage]

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits of shard names, sizes, edge checksums and record counts; not of the place."""
    shards = [(fs.basename(i.path), i.size, i.fingerprint, len(i)) for i in self.indexes]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]

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


def find_shards(path: str, split: str | None = None) -> list[str]:
  """The shards that a path (and the name of a split) means, sorted.

  Raises:
    ValueError: nothing there, some of the shards missing, or several splits and none chosen.
  """
  whole = True
  if "*" in path or "?" in path:
    whole = False
    shards = [p for p in fs.glob(path) if is_shard(p)]
    hint = "no file matches"
  elif match := re.fullmatch(r"(.+)@(\d*)", path):
    shards = _sharded_name(match[1], match[2])
    hint = f"no file is named {match[1]}-?????-of-{match[2].zfill(5) if match[2] else '?????'}"
  elif fs.is_dir(path):
    inside = fs.listdir(path)
    if split in inside:
      return find_shards(fs.join(path, split))
    names = [name for name in inside if is_shard(name)]
    shards = [fs.join(path, name) for name in names if _in_split(name, split)]
    if not split and len(splits := sorted({_stem(name) for name in names})) > 1:
      raise ValueError(
        f"{path} holds several splits ({', '.join(splits)}); choose one with split=..., "
        "or name the shards with a glob"
      )
    hint = f"no *.tfrecord* file of split {split!r} in it" if split else "no *.tfrecord* file in it"
  else:
    whole = False
    shards = [path] if fs.exists(path) else []
    hint = "no such file or directory"
  if not shards:
    raise ValueError(f"no shards at {path}: {hint}")
  if whole:
    _check_complete(shards)
  return shards


def _open_tfds(path: str, split: str | None, progress: Progress | None) -> list[ShardIndex]:
  """A directory of TensorFlow Datasets: its own table says which records make a split."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(
      f"{path} is a TensorFlow Datasets directory, and that library is missing ({error}); "
      "pip install 'ov-data[tensorflow]', or name its shards with a glob"
    ) from None
  splits = tfds.builder_from_directory(path).info.splits
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


def is_shard(name: str) -> bool:
  """Whether a file of that name is a shard."""
  return bool(_IS_SHARD.fullmatch(fs.basename(name))) and not name.endswith(_NOT_SHARD)


def _stem(name: str) -> str:
  match = _NUMBERED.fullmatch(name)
  return match["stem"] if match else name.partition(".tfrec")[0].rstrip("-0123456789")


def _in_split(name: str, split: str | None) -> bool:
  return not split or name.startswith((split + "-", split + "."))


def _sharded_name(stem: str, count: str) -> list[str]:
  count = count.zfill(5) if count else "?????"
  return [p for p in fs.glob(f"{stem}-?????-of-{count}*") if not p.endswith(_NOT_SHARD)]


def _check_complete(shards: Sequence[str]) -> None:
  """Every family a-00000-of-00004, a-00001-of-00004 ... must be whole."""
  families: dict[tuple[str, int, str], set[int]] = {}
  for shard in shards:
    if match := _NUMBERED.fullmatch(shard):
      family = (match["stem"], int(match["count"]), match["rest"])
      families.setdefault(family, set()).add(int(match["number"]))
  for (stem, count, _), numbers in families.items():
    if missing := sorted(set(range(count)) - numbers):
      raise ValueError(
        f"{stem}: {len(missing)} of {count} shards are missing (number {missing[0]} is the first); "
        "complete the copy, or name the shards to use with a glob"
      )


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
