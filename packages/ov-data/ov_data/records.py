"""TFRecord framing: one record = length, its checksum, the bytes, their checksum.

    uint64 length | uint32 masked_crc32c(length) | data[length] | uint32 masked_crc32c(data)

all little-endian. The checksums are CRC-32C, rotated and offset ("masked") so that data which
themselves contain checksums stay well protected.
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

HEADER_BYTES = 12  # length and its checksum, before the data
FOOTER_BYTES = 4  # checksum of the data, after it
MAX_RECORD_BYTES = 1 << 30  # a longer length field is taken as damage, not as an allocation request

_FOREIGN = {  # first bytes of files that are often taken for shards
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
_FIRST_WINDOW, _LAST_WINDOW = 4 << 10, 1 << 20  # bytes searched at once after damage
_FREE_BYTES, _READS_OF_A_BYTE, _MAX_SEARCHES = 64 << 20, 8, 10_000  # bounds on that search


class RecordError(ValueError):
  """A record that cannot be read: `offset` (bytes into the shard) and `reason` (a short word)."""

  def __init__(self, offset: int, reason: str):
    super().__init__(f"record at byte {offset}: {reason}")
    self.offset = offset
    self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """A record of a shard, or a damaged stretch of it.

  Attributes:
    offset: first data byte of the record; first byte of the stretch where no header is intact.
    length: bytes of data, or of the damaged stretch.
    damage: why the bytes must not be used; None for a sound record.
    records: number of records here; None for a stretch whose headers are lost, at least 1.
  """

  offset: int
  length: int
  damage: str | None = None
  records: int | None = 1


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


def scan(stream: BinaryIO, size: int | None = None) -> Iterator[Entry]:
  """Yield every record of a shard in order, both checksums verified.

  A record whose data are damaged is one entry with `damage`. Where a header is damaged, the scan
  continues at the next offset at which a whole record begins: header, data and both checksums fit.
  The bytes up to there are one entry. The work is bounded by a multiple of the size of the shard.

  Args:
    stream: the shard; seekable.
    size: bytes of the shard; None asks the stream.
  """
  if size is None:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
  search = Search(stream, size)
  position = 0  # of `buffer[start]` in the shard
  buffer, start, chunk = b"", 0, _CHUNK_BYTES
  suspect: Entry | None = None  # its data are damaged; so may be its length, see the next header
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
  """Finds where records continue after damage.

  Args:
    stream: the shard.
    size: bytes of the shard.
  """

  def __init__(self, stream: BinaryIO, size: int):
    self._stream = stream
    self._size = size
    self._budget = _FREE_BYTES + _READS_OF_A_BYTE * size  # or crafted headers cost quadratic time
    self._searches = _MAX_SEARCHES

  def spend(self, count: int) -> None:
    """Count bytes that were checksummed in vain."""
    self._budget -= count

  def next_record(self, position: int) -> int:
    """Return the offset of the first whole record from `position` on; the size if there is none."""
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
  """Yield offset and length of every 12 bytes that form a header with a fitting checksum."""
  count = len(data) - HEADER_BYTES + 1
  if count <= 0:
    return
  octets = np.frombuffer(data, np.uint8)
  zero = octets == 0
  possible = octets[3 : 3 + count] <= MAX_RECORD_BYTES >> 24  # a length has 31 bits
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
  """Return what each value of bytes 0 to 3 of a length adds to the checksum of its 8 bytes."""
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
  """Return why the first header of a shard is none."""
  for start, reason in _FOREIGN.items():
    if header.startswith(start):
      return reason
  if header[0] == 0x78 and not int.from_bytes(header[:2], "big") % 31:
    with contextlib.suppress(zlib.error):
      zlib.decompressobj().decompress(header)
      return "zlib-compressed shard"
  return "length checksum"
