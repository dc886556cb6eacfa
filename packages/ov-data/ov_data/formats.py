"""Registry of data formats.

To add a format, implement a `RecordSource` and a function that opens it, and register it here.
"""

from collections.abc import Callable

from ov_data.array_records import ARRAY_RECORD, open_array_records
from ov_data.benchmark_lists import open_benchmark_list
from ov_data.benchmark_tars import open_benchmark_tars
from ov_data.image_folder import open_images
from ov_data.index import TFRECORD, ShardKind
from ov_data.karpathy_file import open_karpathy
from ov_data.parquet_files import PARQUET, open_parquet
from ov_data.record_source import RecordSource
from ov_data.request import Request
from ov_data.shards import Shards, open_shards
from ov_data.tars import TAR, open_tars
from ov_data.tfds import open_tfds

# Tried in this order. A function returns None if the path has another format.
FORMATS: dict[str, Callable[[Request], RecordSource | None]] = {
  "tfds": open_tfds,
  "benchmark_list": open_benchmark_list,
  "benchmark_tars": open_benchmark_tars,
  "karpathy": open_karpathy,
  "images": open_images,
  "tfrecord": open_shards,
  "tar": open_tars,
  "parquet": open_parquet,
  "array_record": open_array_records,
}

# Formats of shards, for `python -m ov_data.index`.
SHARD_KINDS: tuple[ShardKind, ...] = (TFRECORD, TAR, PARQUET, ARRAY_RECORD)


def open_records(request: Request) -> RecordSource:
  """Open a source in the first format that accepts its path.

  Raises:
    ValueError: if the path does not exist, shards are missing, the split is unknown, a split file
      is malformed, or no record is usable.
    OSError: if a file or folder cannot be read.
  """
  for open_format in FORMATS.values():
    if (records := open_format(request)) is not None:
      return records
  return Shards(request)  # its error explains paths that are not shards
