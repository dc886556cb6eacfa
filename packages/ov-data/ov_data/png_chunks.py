"""Walks the chunks of a PNG, and verifies the checksums of those that its pixels depend on.

Each chunk ends with a CRC-32 of its type and content. Pillow skips those of the pixels. Here a
wrong checksum makes the image unusable, except in chunks without which the pixels are the same
(text, profiles, gamma, times, frames of an animation): these are left out anyway.

Format: https://www.w3.org/TR/png-3/#5Chunk-layout. WebP, GIF, JPEG and BMP have no checksums.
"""

from collections.abc import Iterator
import struct
from typing import NamedTuple
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_OVERHEAD = 12  # bytes of a chunk besides its content: length, type, checksum
_ANCILLARY = 0x20  # the bit of the first letter of a type: set in chunks that a decoder may skip
# Chunks that change pixels. A type that was damaged shows in a checksum that is right for one of
# these instead.
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"tRNS")


class Chunk(NamedTuple):
  """A chunk of a PNG.

  Attributes:
    kind: its type, four letters.
    start, stop: where it is in the file, with length, type and checksum. The last one may be cut
      off: then `stop` is after the end of the file.
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


def is_sound(data: bytes, chunk: Chunk) -> bool:
  """Return whether the checksum of a chunk is right."""
  return _checksum(data, chunk, chunk.kind) == _stored(data, chunk)


def problem(data: bytes) -> str:
  """Return why the pixels of a PNG cannot be trusted; "" if all checksums they need are right."""
  for chunk in walk(data):
    kind, start, stop = chunk
    if stop > len(data):
      return ""  # cut off, which the decoder reports where pixels are missing
    if is_sound(data, chunk):
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
