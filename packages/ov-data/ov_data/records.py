"""TFRecord framing: one record = length, its checksum, the bytes, their checksum.

    uint64 length | uint32 masked_crc32c(length) | data[length] | uint32 masked_crc32c(data)

all little-endian. The checksums are CRC-32C, rotated and offset ("masked") so that data which
themselves contain checksums stay well protected.
Format: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

from collections.abc import Iterator
import dataclasses
import struct
from typing import BinaryIO

import google_crc32c

HEADER_BYTES = 12  # length and its checksum, before the data
FOOTER_BYTES = 4  # checksum of the data, behind it
MAX_RECORD_BYTES = 1 << 30  # a longer length field is taken as damage, not as an allocation request

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_CHUNK_BYTES = 8 << 20


class RecordError(ValueError):
  """A record that cannot be read: `offset` (bytes into the shard) and `reason` (a short word)."""

  def __init__(self, offset: int, reason: str):
    super().__init__(f"record at byte {offset}: {reason}")
    self.offset = offset
    self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """Where one record's data lie in a shard; `damage` says why they must not be used."""

  offset: int  # of the first data byte, behind the header
  length: int  # data bytes; 0 where the damage hides it
  damage: str | None = None


def masked_crc32c(data: bytes) -> int:
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
  """The record that holds `data`, ready to be appended to a shard."""
  length = struct.pack("<Q", len(data))
  return b"".join(
    (length, _FOOTER.pack(masked_crc32c(length)), data, _FOOTER.pack(masked_crc32c(data)))
  )


def unframe(record: bytes, offset: int = 0) -> bytes:
  """The data of one framed record; `offset` only serves the error.

  Raises:
    RecordError: a checksum or the length does not fit.
  """
  length = _data_length(record[:HEADER_BYTES], offset)
  if len(record) != HEADER_BYTES + length + FOOTER_BYTES:
    raise RecordError(offset, "truncated record")
  data = record[HEADER_BYTES:-FOOTER_BYTES]
  if _FOOTER.unpack(record[-FOOTER_BYTES:])[0] != masked_crc32c(data):
    raise RecordError(offset, "data checksum")
  return data


def scan(stream: BinaryIO) -> Iterator[Entry]:
  """Every record of a shard in order, both checksums verified.

  A record whose data are damaged is one entry with `damage`, and the scan goes on behind it. When
  a length cannot be trusted, nothing behind it can be found: the last entry tells so.
  """
  position = 0  # of `buffer[start]` in the shard
  buffer, start = b"", 0
  while True:
    while len(buffer) - start < HEADER_BYTES and (chunk := stream.read(_CHUNK_BYTES)):
      buffer, start = buffer[start:] + chunk, 0
    if start == len(buffer):
      return
    header = buffer[start : start + HEADER_BYTES]
    try:
      length = _data_length(header, position)
    except RecordError as error:
      yield Entry(position, 0, error.reason)
      return
    size = HEADER_BYTES + length + FOOTER_BYTES
    missing = size - (len(buffer) - start)
    if missing > 0:
      buffer, start = buffer[start:] + stream.read(max(missing, _CHUNK_BYTES)), 0
    record = buffer[start : start + size]
    if len(record) < size:
      yield Entry(position + HEADER_BYTES, length, "truncated record")
      return
    damage = None
    try:
      unframe(record, position)
    except RecordError as error:
      damage = error.reason
    yield Entry(position + HEADER_BYTES, length, damage)
    position += size
    start += size


def _data_length(header: bytes, offset: int) -> int:
  if len(header) < HEADER_BYTES:
    raise RecordError(offset, "truncated header")
  length, crc = _HEADER.unpack(header)
  if crc != masked_crc32c(header[:8]):
    compressed = offset == 0 and header.startswith(b"\x1f\x8b")
    raise RecordError(offset, "gzip-compressed shard" if compressed else "length checksum")
  if length > MAX_RECORD_BYTES:
    raise RecordError(offset, "length over 1 GiB")
  return length
