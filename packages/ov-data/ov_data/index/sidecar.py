"""The sidecar file: positions and lengths of the records of a shard, with a checksum.

`train-00000.tfrecord` has `train-00000.tfrecord.ovidx` next to it:

    one line of JSON: format, shard size and fingerprint, number of records, damage
    uint64 offsets[n] | uint32 lengths[n] | uint32 crc32c of all bytes before      little-endian
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ov_data import records

SUFFIX = ".ovidx"
FORMAT = "ov_data index 2"

_CHECKSUM_BYTES = 4


class OtherFormat(ValueError):
  """A sidecar that another version has written."""


class Damage(NamedTuple):
  """A stretch of a shard whose bytes must not be used.

  Attributes:
    offset: its first byte; of a record whose header is sound, the first byte of the data.
    length: its bytes.
    reason: a short phrase, fit for counting.
    records: number of records in it; None if unknown, and then at least 1.
  """

  offset: int
  length: int
  reason: str
  records: int | None


@dataclasses.dataclass(frozen=True)
class ShardIndex:
  """The usable records of one shard, and the damage in it.

  Attributes:
    path: of the shard.
    size: bytes of the shard.
    fingerprint: crc32c of its first and last 64 KiB.
    offsets: uint64 [n], of the data of each record.
    lengths: uint32 [n], bytes of the data.
    damage: what cannot be used.
  """

  path: str
  size: int
  fingerprint: int
  offsets: NDArray[np.uint64]
  lengths: NDArray[np.uint32]
  damage: tuple[Damage, ...] = ()

  def __len__(self) -> int:
    return len(self.offsets)


def serialise(index: ShardIndex) -> bytes:
  """Return the bytes of a sidecar."""
  header = {
    "format": FORMAT,
    "size": index.size,
    "fingerprint": index.fingerprint,
    "records": len(index),
    "damage": index.damage,
  }
  payload = index.offsets.astype("<u8").tobytes() + index.lengths.astype("<u4").tobytes()
  content = json.dumps(header).encode() + b"\n" + payload
  return content + google_crc32c.value(content).to_bytes(_CHECKSUM_BYTES, "little")


def parse(path: str, data: bytes) -> ShardIndex:
  """Return the index of the shard `path` from the bytes of its sidecar.

  Raises:
    OtherFormat: another version wrote it.
    ValueError: the sidecar is damaged or contradicts itself; says which.
  """
  content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
  line, _, payload = content.partition(b"\n")
  if b'"ov_data index ' in line and f'"{FORMAT}"'.encode() not in line:
    raise OtherFormat
  if int.from_bytes(checksum, "little") != google_crc32c.value(content):
    raise ValueError("checksum")
  try:
    header = json.loads(line)
    size, count = _natural(header["size"]), _natural(header["records"])
    fingerprint = _natural(header["fingerprint"])
    damage = tuple(_damage(*item) for item in header["damage"])
  except (KeyError, TypeError, RecursionError) as error:
    raise ValueError(f"header ({type(error).__name__})") from None
  if len(payload) != 12 * count:
    raise ValueError(f"{len(payload)} bytes for {count} records")
  offsets = np.frombuffer(payload, "<u8", count)
  lengths = np.frombuffer(payload, "<u4", count, 8 * count)
  _check_positions(size, offsets, lengths, damage)
  return ShardIndex(path, size, fingerprint, offsets, lengths, damage)


def _check_positions(
  size: int, offsets: NDArray[np.uint64], lengths: NDArray[np.uint32], damage: Sequence[Damage]
) -> None:
  """Raise ValueError unless records and damage fill the shard in order."""
  starts = offsets.astype(np.int64)
  ends = starts + lengths
  gap = records.HEADER_BYTES + records.FOOTER_BYTES
  if not damage:
    last = int(ends[-1]) + records.FOOTER_BYTES if len(ends) else 0
    first = int(starts[0]) if len(starts) else records.HEADER_BYTES
    if first != records.HEADER_BYTES or last != size or not (ends[:-1] + gap == starts[1:]).all():
      raise ValueError(f"the records do not fill {size} bytes")
    return
  inside = not len(offsets) or records.HEADER_BYTES <= offsets.min() <= offsets.max() <= size
  if (
    not inside or (ends + records.FOOTER_BYTES > size).any() or (ends[:-1] + gap > starts[1:]).any()
  ):
    raise ValueError("records overlap or leave the shard")
  if any(item.offset + item.length > size for item in damage):
    raise ValueError("damage outside the shard")


def _damage(offset: Any, length: Any, reason: Any, count: Any) -> Damage:
  if not isinstance(reason, str):
    raise TypeError
  return Damage(
    _natural(offset), _natural(length), reason, None if count is None else _natural(count)
  )


def _natural(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
    raise TypeError
  return value
