"""Writers of the same records in every format of shards."""

from collections.abc import Callable, Mapping, Sequence
import io
import os
from pathlib import Path
import tarfile

import numpy as np
from PIL import Image

from ov_data import example
from ov_data.writer import ShardWriter

Rows = Sequence[Mapping[str, bytes | str | int]]


def photo_rows(count: int) -> list[dict[str, bytes | str]]:
  """Return rows with a small JPEG of noise and a caption."""
  rng = np.random.default_rng(0)
  rows: list[dict[str, bytes | str]] = []
  for number in range(count):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(buffer, "JPEG")
    rows.append({"jpg": buffer.getvalue(), "txt": f"a photo of {number}"})
  return rows


def write_tfrecord(path: Path, rows: Rows) -> None:
  """Write rows as `tf.train.Example`s of a TFRecord file."""
  with ShardWriter(path) as shard:
    for row in rows:
      shard.write(row)


def write_tar(path: Path, rows: Rows, *, format: int = tarfile.PAX_FORMAT) -> None:
  """Write rows as samples of a tar, one member for each feature, as webdataset does.

  Times with fractions make the default format write PAX headers.
  """
  with tarfile.open(path, "w", format=format) as tar:
    for number, row in enumerate(rows):
      for suffix, value in row.items():
        content = value if isinstance(value, bytes) else str(value).encode()
        member = tarfile.TarInfo(f"{number:08d}.{suffix}")
        member.size, member.mtime = len(content), 1.5
        tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, rows: Rows, *, row_group_size: int = 7) -> None:
  """Write rows as rows of a Parquet file."""
  import pyarrow as pa
  from pyarrow import parquet

  table = pa.Table.from_pylist([dict(row) for row in rows])
  parquet.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)


def write_array_record(path: Path, rows: Rows) -> None:
  """Write rows as `tf.train.Example`s of an ArrayRecord file, one record per chunk."""
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
  for row in rows:
    writer.write(example.serialise(row))
  writer.close()


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
  "tfrecord": write_tfrecord,
  "tar": write_tar,
  "parquet": write_parquet,
  "array_record": write_array_record,
}


def write_shards(folder: Path, format: str, rows: Rows, shards: int) -> Path:
  """Write rows as shards of equal size, the same rows in the same order for every format.

  Args:
    folder: new folder.
    format: key of `WRITERS`.
    rows: features of each record.
    shards: number of shards.

  Returns:
    The folder.
  """
  folder.mkdir()
  size = -(-len(rows) // shards)
  for number in range(shards):
    path = folder / f"train-{number:05d}-of-{shards:05d}.{format}"
    WRITERS[format](path, rows[number * size : (number + 1) * size])
  return folder
