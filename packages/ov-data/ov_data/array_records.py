"""Record source over ArrayRecord files with a `tf.train.Example` in each record.

TensorFlow Datasets and grain write this format. The library `array_record` reads the files, which
contain their own index and checksums.
"""

from collections.abc import Collection, Sequence
import functools
import re
from typing import Any, NamedTuple

from ov_data import example, fs
from ov_data.example import FeatureError
from ov_data.index import Damage, Scan, ShardKind
from ov_data.record_source import Record
from ov_data.records import RecordError
from ov_data.request import Request
from ov_data.shard_files import ShardFiles, ShardRuns
from ov_data.shard_names import is_shard

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_FILES = 256


def open_array_records(request: Request) -> ShardFiles | None:
  """Open ArrayRecord files; return None if no file at the path has their name.

  Raises:
    ValueError, OSError: see `ShardFiles`.
    ImportError: if array_record is not installed.
  """
  if not any(is_shard(name, ARRAY_RECORD) for name in request.names):
    return None
  return ArrayRecords(request)


def scan_array_record(path: str, size: int) -> Scan:
  """Read the number of records of an ArrayRecord file from its footer."""
  file = _open(path)
  if not file.ok():
    return Scan(0, (Damage(0, size, "not a readable ArrayRecord file", None),))
  return Scan(file.num_records())


ARRAY_RECORD = ShardKind(
  "ArrayRecord",
  ".array_record*",
  re.compile(r".*\.array_?records?([-.].*)?", re.S | re.I),
  scan_array_record,
  has_columns=False,
)


class _Bytes(NamedTuple):
  """A record: its number in the file, and its bytes; None if it is damaged."""

  number: int
  data: bytes | None


class ArrayRecords(ShardRuns):
  """The records of ArrayRecord files."""

  kind = ARRAY_RECORD
  unit = "record"

  def __init__(self, request: Request, files: Sequence[str] | None = None):
    super().__init__(request, files)
    self._file = functools.lru_cache(_OPEN_FILES)(_open)

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file of a record and the number of the record in it."""
    shard, number = self._place(record)
    return self.indexes[shard].path, self.indexes[shard].first + number

  def _fetch(self, shard: int, first: int, stop: int) -> list[_Bytes]:
    index = self.indexes[shard]
    numbers = range(index.first + first, index.first + stop)
    file = self._file(index.path)
    try:
      return [_Bytes(n, data) for n, data in zip(numbers, file.read([*numbers]), strict=True)]
    except (ValueError, RuntimeError):
      if len(numbers) == 1:
        return [_Bytes(numbers[0], None)]
    return [record for n in range(first, stop) for record in self._fetch(shard, n, n + 1)]

  def _parse(self, raw: _Bytes, keys: Collection[str] | None) -> Record:
    if raw.data is None:
      raise RecordError(raw.number, "damaged record")
    try:
      return Record.of(example.parse(raw.data, keys), self._image_key)
    except ValueError:
      raise FeatureError("not a tf.train.Example") from None


def _open(path: str) -> Any:
  if fs.is_remote(path):
    raise ValueError(
      f"{path}: ArrayRecord files are read from local folders only; mount the bucket (gcsfuse, "
      "mount-s3), or copy the files"
    )
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise ImportError(
      f"reading {path} requires array_record, which is not installed ({error}); "
      "pip install 'ov-data[array_record]' (Linux)"
    ) from None
  return array_record_module.ArrayRecordReader(path, _RANDOM_ACCESS)
