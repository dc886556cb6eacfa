"""Iteration over PNG chunks and verification of the checksums that affect pixels.

Each chunk ends with a CRC-32 of its type and content. Pillow does not verify it for pixel data.
This module rejects an image with a wrong checksum, except in chunks that do not affect pixels
(text, profiles, gamma, times, animation frames), which are removed anyway.

Format: https://www.w3.org/TR/png-3/#5Chunk-layout. WebP, GIF, JPEG and BMP have no checksums.
"""

from collections.abc import Iterator
import struct
from typing import NamedTuple
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_OVERHEAD = 12  # bytes of length, type and checksum
_ANCILLARY = 0x20  # bit of the first letter of the type, set in chunks that a decoder may skip
# Chunks that affect pixels. If the checksum is correct for one of these types instead, the type of
# the chunk is damaged.
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"tRNS")


class Chunk(NamedTuple):
  """A chunk of a PNG.

  Attributes:
    kind: chunk type of four letters.
    start, stop: byte range in the file, including length, type and checksum. `stop` is after the
      end of the file if the last chunk is truncated.
  """

  kind: bytes
  start: int
  stop: int


def walk(data: bytes) -> Iterator[Chunk]:
  """Yield the chunks up to and including IEND, or to the end of the file."""
  position = len(SIGNATURE)
  while position + 8 <= len(data):
    length, kind = struct.unpack_from(">I4s", data, position)
    stop = position + _OVERHEAD + length
    yield Chunk(kind, position, stop)
    if kind == b"IEND":
      return
    position = stop


def has_valid_checksum(data: bytes, chunk: Chunk) -> bool:
  """Return whether the checksum of a chunk is correct."""
  return _checksum(data, chunk, chunk.kind) == _stored(data, chunk)


def problem(data: bytes) -> str:
  """Return which chunk is damaged; "" if all checksums that affect pixels are correct."""
  for chunk in walk(data):
    kind, start, stop = chunk
    if stop > len(data):
      return ""  # truncated; the decoder reports missing pixels
    if has_valid_checksum(data, chunk):
      continue
    stored = _stored(data, chunk)
    skipped = kind.isalpha() and kind[0] & _ANCILLARY and kind not in _PIXEL_CHUNKS
    if not skipped or any(_checksum(data, chunk, other) == stored for other in _PIXEL_CHUNKS):
      return f"wrong checksum of the PNG chunk {kind!r} at byte {start}"
  return ""


def _stored(data: bytes, chunk: Chunk) -> int:
  return int.from_bytes(data[chunk.stop - 4 : chunk.stop], "big")


def _checksum(data: bytes, chunk: Chunk, kind: bytes) -> int:
  content = memoryview(data)[chunk.start + 8 : chunk.stop - 4]
  return zlib.crc32(content, zlib.crc32(kind))
