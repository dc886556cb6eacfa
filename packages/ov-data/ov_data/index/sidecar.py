"""Sidecar file format: offsets and lengths of the records of a shard, with a checksum.

`train-00000.tfrecord` has `train-00000.tfrecord.ovidx` next to it:

    one line of JSON: format, shard size and fingerprint, number of records, damage
    uint64 offsets[n] | uint32 lengths[n] | uint32 crc32c of all previous bytes    little-endian

Tars have a third column before the checksum: uint32 crc32c of the headers of each record.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ov_data import fs
from ov_data.index.kind import TFRECORD, Columns, Damage, ShardKind

SUFFIX = ".ovidx"
FORMAT = "ov_data index 2"

CHECKSUM_BYTES = 4
_DTYPES: tuple[np.dtype[Any], ...] = (
  np.dtype("<u8"),
  np.dtype("<u4"),
  np.dtype("<u4"),
)  # offsets, lengths, checksums

OpenFile = Callable[[str], fs.Reader]


class OtherFormat(ValueError):
  """A sidecar written by another version."""


@dataclasses.dataclass(frozen=True, slots=True)
class ShardIndex:
  """The valid records and damaged ranges of a shard.

  The positions of the records stay in the sidecar file, so an index takes a few hundred bytes of
  memory for any number of records.

  Attributes:
    path: path of the shard.
    size: size of the shard in bytes.
    fingerprint: crc32c of the first and last 64 KiB.
    records: number of records.
    damage: damaged ranges.
    kind: format of the shard.
    sidecar: local path of the sidecar; "" if `columns` are in memory, or the format has none.
    start: byte offset of the positions in the sidecar.
    total: number of records in the sidecar.
    first: number of the first record of this index in the sidecar.
    columns: positions of the `total` records if they could not be stored.
  """

  path: str
  size: int
  fingerprint: int
  records: int
  damage: tuple[Damage, ...] = ()
  kind: ShardKind = TFRECORD
  sidecar: str = ""
  start: int = 0
  total: int = 0
  first: int = 0
  columns: Columns | None = None

  def __len__(self) -> int:
    return self.records

  def part(self, first: int, stop: int) -> "ShardIndex":
    """Return the index of the records [first, stop)."""
    return dataclasses.replace(self, records=stop - first, first=self.first + first)

  def positions(self, first: int, stop: int, open_file: OpenFile = fs.Reader) -> Columns:
    """Read the positions of the records [first, stop).

    Args:
      first, stop: range of records.
      open_file: function that opens the sidecar; it may return an open one.

    Raises:
      OSError: if the sidecar was removed, truncated, or cannot be read.
    """
    first, stop = self.first + first, self.first + stop
    if self.columns is not None:
      return self.columns[first:stop]
    file = open_file(self.sidecar)
    columns: list[Any] = []
    at = self.start
    for dtype in _DTYPES[: 2 + self.kind.has_checksums]:
      data = file.read(at + first * dtype.itemsize, (stop - first) * dtype.itemsize)
      if len(data) != (stop - first) * dtype.itemsize:
        raise FileNotFoundError(f"{self.sidecar}: the index is truncated")
      columns.append(np.frombuffer(data, dtype))
      at += self.total * dtype.itemsize
    return Columns(*columns)

  @property
  def offsets(self) -> NDArray[np.uint64]:
    """Offset of the data of each record in bytes, uint64 [n]."""
    return self.positions(0, self.records).offsets

  @property
  def lengths(self) -> NDArray[np.uint32]:
    """Length of the data of each record in bytes, uint32 [n]."""
    return self.positions(0, self.records).lengths


def serialise(index: ShardIndex) -> bytes:
  """Serialize an index to the bytes of a sidecar."""
  header = {
    "format": FORMAT,
    **({} if index.kind is TFRECORD else {"kind": index.kind.name}),
    "size": index.size,
    "fingerprint": index.fingerprint,
    "records": len(index),
    "damage": index.damage,
  }
  found = index.positions(0, len(index))
  columns: tuple[Any, ...] = (found.offsets, found.lengths, found.checksums)
  columns = columns[: 2 + index.kind.has_checksums]
  payload = b"".join(np.asarray(c).astype(d).tobytes() for c, d in zip(columns, _DTYPES))
  content = json.dumps(header).encode() + b"\n" + payload
  return content + google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "little")


def stored_at(index: ShardIndex, location: str, size: int) -> ShardIndex:
  """Return an index whose positions are in the sidecar of `size` bytes at `location`."""
  start = size - CHECKSUM_BYTES - index.kind.bytes_per_record * len(index)
  return dataclasses.replace(index, sidecar=location, start=start, columns=None)


def parse(path: str, data: bytes, kind: ShardKind = TFRECORD) -> ShardIndex:
  """Parse the sidecar of the shard `path`.

  Raises:
    OtherFormat: if another version wrote the sidecar, or it belongs to another format of shards.
    ValueError: if the sidecar is damaged or inconsistent.
  """
  content, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
  line, _, payload = content.partition(b"\n")
  if b'"ov_data index ' in line and f'"{FORMAT}"'.encode() not in line:
    raise OtherFormat
  if int.from_bytes(checksum, "little") != google_crc32c.value(content):
    raise ValueError("checksum")
  try:
    header = json.loads(line)
    size, count = natural(header["size"]), natural(header["records"])
    fingerprint = natural(header["fingerprint"])
    damage = tuple(parse_damage(*item) for item in header["damage"])
    if header.get("kind", TFRECORD.name) != kind.name:
      raise OtherFormat
  except (KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"header ({type(error).__name__})") from None
  if len(payload) != kind.bytes_per_record * count:
    raise ValueError(f"{len(payload)} bytes for {count} records")
  columns = Columns(
    np.frombuffer(payload, "<u8", count),
    np.frombuffer(payload, "<u4", count, 8 * count),
    np.frombuffer(payload, "<u4", count, 12 * count) if kind.has_checksums else None,
  )
  _check_positions(kind, size, columns, damage)
  return ShardIndex(path, size, fingerprint, count, damage, kind, total=count, columns=columns)


def _check_positions(
  kind: ShardKind, size: int, columns: Columns, damage: Sequence[Damage]
) -> None:
  """Raise ValueError unless records and damaged ranges are inside the shard and in order."""
  starts = columns.offsets.astype(np.int64)
  ends = starts + columns.lengths
  gap = kind.before + kind.after
  if not damage and kind.is_framed:
    last = int(ends[-1]) + kind.after if len(ends) else 0
    first = int(starts[0]) if len(starts) else kind.before
    if first != kind.before or last != size or not (ends[:-1] + gap == starts[1:]).all():
      raise ValueError(f"the records do not cover {size} bytes")
    return
  inside = not len(starts) or kind.before <= starts.min() <= starts.max() <= size
  if not inside or (ends + kind.after > size).any() or (ends[:-1] + gap > starts[1:]).any():
    raise ValueError("records overlap or exceed the shard")
  if any(item.offset + item.length > size for item in damage):
    raise ValueError("damage outside the shard")


def parse_damage(offset: Any, length: Any, reason: Any, count: Any) -> Damage:
  """Return a damaged range from its JSON values; raise TypeError if they have other types."""
  if not isinstance(reason, str):
    raise TypeError
  return Damage(natural(offset), natural(length), reason, None if count is None else natural(count))


def natural(value: Any) -> int:
  """Return a JSON value that is a natural number; raise TypeError if it is not one."""
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
    raise TypeError
  return value
