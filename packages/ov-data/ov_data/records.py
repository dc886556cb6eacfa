"""TFRecord framing: length, checksum of the length, data, checksum of the data.

    uint64 length | uint32 masked_crc32c(length) | data[length] | uint32 masked_crc32c(data)

All fields are little-endian. The checksums are CRC-32C, rotated and offset ("masked") because CRCs
of data that contain CRCs are weak.
Format: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import os
import struct
from typing import BinaryIO
import zlib

import google_crc32c
import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 12  # length and its checksum
FOOTER_BYTES = 4  # checksum of the data
MAX_RECORD_BYTES = 1 << 30  # larger length fields are treated as damage

_FOREIGN = {  # signatures of files that are often mistaken for shards
  b"\x1f\x8b": "gzip-compressed shard",
  b"\x28\xb5\x2f\xfd": "zstd-compressed shard",
  b"BZh": "bzip2-compressed shard",
  b"\xfd7zXZ\0": "xz-compressed shard",
  b"PK\3\4": "zip archive",
  b"version http": "Git LFS pointer",
  b"<!DOCTYPE": "web page",
  b"<!doctype": "web page",
  b"<html": "web page",
  b"<?xml": "XML file",
}
FOREIGN_REASONS = frozenset((*_FOREIGN.values(), "zlib-compressed shard"))

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_CHUNK_BYTES = 8 << 20
_FIRST_WINDOW, _LAST_WINDOW = 4 << 10, 1 << 20  # bytes per search step after damage
_FREE_BYTES, _READS_PER_BYTE, _MAX_SEARCHES = 64 << 20, 8, 10_000  # bounds on that search


class RecordError(ValueError):
  """An unreadable record, with `offset` in the shard in bytes and `reason` as a short phrase."""

  def __init__(self, offset: int, reason: str):
    super().__init__(f"record at byte {offset}: {reason}")
    self.offset = offset
    self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """A record or a damaged byte range of a shard.

  Attributes:
    offset: first data byte of the record, or first byte of a range without a valid header.
    length: number of data bytes or damaged bytes.
    damage: reason of the damage; None for a valid record.
    records: number of records; None (at least 1) for a range without valid headers.
  """

  offset: int
  length: int
  damage: str | None = None
  records: int | None = 1


def masked_crc32c(data: bytes) -> int:
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
  """Return `data` framed as a TFRecord."""
  length = struct.pack("<Q", len(data))
  return b"".join(
    (length, _FOOTER.pack(masked_crc32c(length)), data, _FOOTER.pack(masked_crc32c(data)))
  )


def unframe(record: bytes, offset: int = 0) -> bytes:
  """Return the data of one framed record.

  Args:
    record: bytes of the framed record.
    offset: byte offset of the record, for the error message.

  Raises:
    RecordError: if the length or a checksum does not match.
  """
  length = _data_length(record[:HEADER_BYTES], offset)
  if len(record) != HEADER_BYTES + length + FOOTER_BYTES:
    raise RecordError(offset, "truncated record")
  data = record[HEADER_BYTES:-FOOTER_BYTES]
  if _FOOTER.unpack(record[-FOOTER_BYTES:])[0] != masked_crc32c(data):
    raise RecordError(offset, "data checksum")
  return data


def scan(stream: BinaryIO, size: int | None = None) -> Iterator[Entry]:
  """Yield the records of a shard in order and verify both checksums.

  A record with damaged data is one entry with `damage`. After a damaged header, the scan resumes at
  the next offset at which a complete record with two valid checksums begins. The bytes in between
  are one entry. The work is bounded by a multiple of the size of the shard.

  Args:
    stream: seekable stream of the shard.
    size: size of the shard in bytes; None determines it from the stream.
  """
  if size is None:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
  search = Search(stream, size)
  position = 0  # of `buffer[start]` in the shard
  buffer, start, chunk = b"", 0, _CHUNK_BYTES
  suspect: Entry | None = None  # damaged data, maybe damaged length
  while True:
    while len(buffer) - start < HEADER_BYTES and (more := stream.read(chunk)):
      buffer, start, chunk = buffer[start:] + more, 0, min(2 * chunk, _CHUNK_BYTES)
    if start == len(buffer):
      if suspect:
        yield suspect
      return
    data_start = position + HEADER_BYTES
    try:
      length = _data_length(buffer[start : start + HEADER_BYTES], position)
      record_bytes = HEADER_BYTES + length + FOOTER_BYTES
      if position + record_bytes > size:
        raise RecordError(position, "truncated record")
    except RecordError as error:
      first = suspect.offset - HEADER_BYTES if suspect else position
      found = size if error.reason in FOREIGN_REASONS else search.next_record(first + 1)
      if suspect and found < position:
        yield Entry(first, found - first, suspect.damage, None)
      else:
        if suspect:
          yield suspect
        lost = 1 if found == size and error.reason.startswith("truncated") else None
        offset = data_start if error.reason == "truncated record" else position
        yield Entry(offset, found - offset, error.reason, lost)
      if found == size:
        return
      stream.seek(found)
      position, buffer, start, chunk, suspect = found, b"", 0, _FIRST_WINDOW, None
      continue
    if suspect:
      yield suspect
      suspect = None
    missing = record_bytes - (len(buffer) - start)
    if missing > 0:
      buffer, start = buffer[start:] + stream.read(max(missing, chunk)), 0
      chunk = min(2 * chunk, _CHUNK_BYTES)
    stop = start + HEADER_BYTES + length
    data = buffer[start + HEADER_BYTES : stop]
    if buffer[stop : stop + FOOTER_BYTES] == _FOOTER.pack(masked_crc32c(data)):
      yield Entry(data_start, length)
    else:
      suspect = Entry(data_start, length, "data checksum")
      search.spend(record_bytes)
    position += record_bytes
    start += record_bytes


class Search:
  """Search for the next valid record after damage.

  Args:
    stream: seekable stream of the shard.
    size: size of the shard in bytes.
  """

  def __init__(self, stream: BinaryIO, size: int):
    self._stream = stream
    self._size = size
    self._budget = _FREE_BYTES + _READS_PER_BYTE * size  # avoids quadratic time
    self._searches = _MAX_SEARCHES

  def spend(self, count: int) -> None:
    """Charge bytes of failed checksums to the budget."""
    self._budget -= count

  def next_record(self, position: int) -> int:
    """Return the offset of the first complete record from `position` on, or the shard size."""
    self._searches -= 1
    window = _FIRST_WINDOW
    while self._searches >= 0 and self._budget > 0 and position < self._size:
      self._stream.seek(position)
      data = self._stream.read(window + HEADER_BYTES - 1)
      for offset, length in _headers(data):
        if self._is_record(position + offset, length):
          return position + offset
      position += window
      window = min(2 * window, _LAST_WINDOW)
    return self._size

  def _is_record(self, position: int, length: int) -> bool:
    record_bytes = HEADER_BYTES + length + FOOTER_BYTES
    if position + record_bytes > self._size or record_bytes > self._budget:
      return False
    self._stream.seek(position)
    try:
      unframe(self._stream.read(record_bytes), position)
      return True
    except RecordError:
      self.spend(max(record_bytes, _FIRST_WINDOW))
      return False


def _headers(data: bytes) -> Iterator[tuple[int, int]]:
  """Yield offset and record length of every valid header in `data`."""
  count = len(data) - HEADER_BYTES + 1
  if count <= 0:
    return
  octets = np.frombuffer(data, np.uint8)
  zero = octets == 0
  possible = octets[3 : 3 + count] <= MAX_RECORD_BYTES >> 24  # lengths have at most 31 bits
  for byte in range(4, 8):
    possible &= zero[byte : byte + count]
  offsets = np.flatnonzero(possible)
  crc = np.full(len(offsets), google_crc32c.value(bytes(8)), np.uint32)
  for byte, table in enumerate(_length_tables()):
    crc ^= table[octets[offsets + byte]]
  stored = np.zeros(len(offsets), np.uint32)
  for byte in range(4):
    stored |= octets[offsets + 8 + byte].astype(np.uint32) << np.uint32(8 * byte)
  masked = (crc >> np.uint32(15) | crc << np.uint32(17)) + np.uint32(0xA282EAD8)
  for offset in offsets[masked == stored].tolist():
    length, _ = _HEADER.unpack_from(data, offset)
    if length <= MAX_RECORD_BYTES:
      yield offset, length


@functools.cache
def _length_tables() -> list[NDArray[np.uint32]]:
  """Return CRC tables for bytes 0 to 3 of the 8-byte length."""
  zeros = google_crc32c.value(bytes(8))
  return [
    np.array(
      [google_crc32c.value(struct.pack("<Q", value << 8 * byte)) ^ zeros for value in range(256)],
      np.uint32,
    )
    for byte in range(4)
  ]


def _data_length(header: bytes, offset: int) -> int:
  if len(header) < HEADER_BYTES:
    raise RecordError(offset, "truncated header")
  length, crc = _HEADER.unpack(header)
  if crc != masked_crc32c(header[:8]):
    raise RecordError(offset, _foreign_format(header) if offset == 0 else "length checksum")
  if length > MAX_RECORD_BYTES:
    raise RecordError(offset, "length over 1 GiB")
  return length


def _foreign_format(header: bytes) -> str:
  """Return the format of a file that does not begin with a valid header."""
  for start, reason in _FOREIGN.items():
    if header.startswith(start):
      return reason
  if header[0] == 0x78 and not int.from_bytes(header[:2], "big") % 31:
    with contextlib.suppress(zlib.error):
      zlib.decompressobj().decompress(header)
      return "zlib-compressed shard"
  return "length checksum"
