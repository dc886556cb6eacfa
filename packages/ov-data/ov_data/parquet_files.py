"""Record source over Parquet files with the bytes of an image in each row.

The features of a record are the columns of a row. Fields of a struct are joined with "/". A struct
with the field `bytes`, in which Hugging Face stores images, also stands for that field:
`image_key="image"`. Rows are stored in groups, which are read and decoded as a whole.
"""

from collections.abc import Collection, Sequence
import functools
import logging
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ov_data import fs
from ov_data.example import Feature
from ov_data.index import Damage, Scan, ShardKind
from ov_data.record_source import Record
from ov_data.records import RecordError
from ov_data.request import Request
from ov_data.shard_files import Cache, ShardFiles
from ov_data.shard_names import is_shard

_LISTS = ("metadata.parquet",)  # list of an imagefolder, not data
_FOOTERS = 256  # files whose footers are kept
_CACHED_BYTES = 512 << 20  # decoded row groups that are kept for random access

log = logging.getLogger("ov_data")


def open_parquet(request: Request) -> ShardFiles | None:
  """Open Parquet files; return None if no file at the path has their name.

  Raises:
    ValueError, OSError: see `ShardFiles`.
    ImportError: if pyarrow is not installed.
  """
  names = [name for name in request.names if fs.basename(name) not in _LISTS]
  return ParquetFiles(request) if any(is_shard(name, PARQUET) for name in names) else None


def scan_parquet(path: str, size: int) -> Scan:
  """Read the number of rows of a Parquet file from its footer."""
  parquet = _pyarrow(path)
  with fs.RandomFile(path, size) as file:
    try:
      return Scan(parquet.read_metadata(file).num_rows)
    except (ValueError, OSError):
      if file.error is not None:
        raise file.error from None
      return Scan(0, (Damage(0, size, "not a readable Parquet file", None),))


PARQUET = ShardKind(
  "Parquet", ".parquet", re.compile(r".*\.parquet", re.S | re.I), scan_parquet, has_columns=False
)


class _Footer(NamedTuple):
  """Footer of a file: its metadata, the names of its columns, and the first row of each group."""

  metadata: Any
  names: tuple[str, ...]
  firsts: NDArray[np.int64]


class ParquetFiles(ShardFiles):
  """The rows of Parquet files."""

  kind = PARQUET

  def __init__(self, request: Request, files: Sequence[str] | None = None):
    super().__init__(request, files)
    self._footer = functools.lru_cache(_FOOTERS)(self._read_footer)
    self._groups = Cache(self._read_group, self._capacity(request))

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file of a record and the offset of its row group."""
    shard, group, _ = self._group(record)
    return self.indexes[shard].path, _offset(self._footer(shard).metadata.row_group(group))

  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a record; see `RecordSource.read`."""
    shard, group, row = self._group(record)
    columns = self._footer(shard).names
    if keys is not None:
      wanted = {*keys, *(key.partition("/")[0] for key in keys)}
      columns = tuple(name for name in columns if name in wanted)
    table = self._groups.get((shard, group, columns))
    features: dict[str, Feature] = {}
    for name, column in zip(columns, table, strict=True):
      _add(features, name, column[row].as_py())
    if keys is not None:
      features = {key: value for key, value in features.items() if key in keys}
    return Record.of(features, self._image_key)

  def _group(self, record: int) -> tuple[int, int, int]:
    """Return the file of a record, its row group in the file, and its row in the group."""
    shard, number = self._place(record)
    firsts = self._footer(shard).firsts
    row = self.indexes[shard].first + number
    group = int(np.searchsorted(firsts, row, "right")) - 1
    return shard, group, row - int(firsts[group])

  def _read_footer(self, shard: int) -> _Footer:
    index = self.indexes[shard]
    with fs.RandomFile(index.path, index.size, self._reader(index.path)) as file:
      metadata = _pyarrow(index.path).read_metadata(file)
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return _Footer(
      metadata, tuple(metadata.schema.to_arrow_schema().names), np.cumsum([0, *rows[:-1]])
    )

  def _read_group(self, key: tuple[int, int, tuple[str, ...]]) -> list[Any]:
    """Return columns of a row group, given the file, the number of the group, and the columns."""
    shard, group, columns = key
    index, footer = self.indexes[shard], self._footer(shard)
    with fs.RandomFile(index.path, index.size, self._reader(index.path)) as file:
      try:
        opened = _pyarrow(index.path).ParquetFile(
          file, metadata=footer.metadata, pre_buffer=True, page_checksum_verification=True
        )
        table = opened.read_row_group(group, list(columns), use_threads=False)
      except (ValueError, OSError) as error:
        if file.error is not None:
          raise file.error from None
        offset = _offset(footer.metadata.row_group(group))
        raise RecordError(offset, "damaged row group") from error
    return [table.column(name) for name in columns]

  def _capacity(self, request: Request) -> int:
    """Return the number of row groups to keep in memory."""
    if not len(self):
      return 1
    first = self._footer(0).metadata.row_group(0)
    rows, size = max(1, first.num_rows), max(1, first.total_byte_size)
    if request.run > 1:
      # A run of kept records spans more rows, but no more groups than it has records.
      spread = 1.0 if request.keep is None else len(self) / len(request.keep)
      groups = min(request.run, -(-int(request.run * spread) // rows) + 1)
      return request.cached_runs * groups
    kept = max(4, _CACHED_BYTES // size)
    if kept * rows < len(self):
      log.warning(
        "%s: with shuffle='global' most examples decode a row group of %d rows (%.1f MB), because "
        "only %d groups fit in memory; use shuffle='block'",
        fs.printable(request.source.paths[0]),
        rows,
        size / 1e6,
        kept,
      )
    return kept


def _offset(group: Any) -> int:
  column = group.column(0)
  offsets = (column.dictionary_page_offset, column.data_page_offset)
  return min(offset for offset in offsets if offset is not None)


def _add(features: dict[str, Feature], name: str, value: Any) -> None:
  """Add the value of a column to the features. Values of other types are left out."""
  if isinstance(value, dict):
    for field, inner in value.items():
      _add(features, f"{name}/{field}", inner)
    if isinstance(value.get("bytes"), bytes):
      features[name] = [value["bytes"]]
    return
  values = value if isinstance(value, list) else [value]
  if all(isinstance(item, bytes | str) for item in values):
    features[name] = [item.encode() if isinstance(item, str) else item for item in values]
  elif all(isinstance(item, int) for item in values):
    features[name] = np.array(values, np.int64)
  elif all(isinstance(item, int | float) for item in values):
    features[name] = np.array(values, np.float32)


def _pyarrow(path: str) -> Any:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise ImportError(
      f"reading {path} requires pyarrow, which is not installed ({error}); "
      "pip install 'ov-data[parquet]'"
    ) from None
  return parquet
