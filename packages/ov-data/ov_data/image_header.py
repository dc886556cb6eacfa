"""Header parsing (size, orientation) and metadata removal for encoded images.

Decoders parse text, profiles, thumbnails and maker notes, which do not affect pixels, and fail on
malformed ones. This module walks a container once, keeps the parts that affect pixels, reads the
EXIF orientation, and skips everything else by its length. The walk is bounded and decodes nothing.

Formats: JPEG https://www.w3.org/Graphics/JPEG/itu-t81.pdf, PNG https://www.w3.org/TR/png-3,
WebP https://developers.google.com/speed/webp/docs/riff_container,
GIF https://www.w3.org/Graphics/GIF/spec-gif89a.txt, EXIF https://www.cipa.jp/e/std/std-sec.html.
"""

from collections.abc import Callable, Iterator
import dataclasses
import re
import struct
from typing import Literal

from ov_data import png_chunks

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
JPEG_END = b"\xff\xd9"

_MAX_PARTS = 65_536  # segments, chunks or blocks of one image; valid files have far fewer
_MAX_GIF_BLOCKS = 1 << 20  # blocks of at most 255 bytes
_MAX_RLE_BYTES = 4 << 20  # limit for run-length BMPs, which Pillow decodes in Python
_PNG_PIXEL_CHUNKS = (b"PLTE", b"IDAT")
_PNG_TRANSPARENCY = {0: (2,), 2: (6,), 3: range(1, 257)}  # allowed sizes of tRNS by color type
_WEBP_PIXEL_CHUNKS = (b"ALPH", b"VP8 ", b"VP8L")
_ANIMATION = 0x02  # VP8X flag
_ALPHA = 0x10
_ORIENTATION_TAG = 0x0112
_EXIF = b"Exif\0\0"
# Baseline, extended and progressive frames, with Huffman or arithmetic coding.
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_JPEG_OTHER_FRAMES = {
  0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical",
  0xCB: "lossless", 0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "hierarchical",
}  # fmt: skip
# End of entropy-coded data: any marker except a stuffed zero, a restart or a fill byte.
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_OTHER_FORMATS = {
  b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "BigTIFF", b"MM\0+": "BigTIFF",
  b"\0\0\0\x0cJXL ": "JPEG XL", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000",
  b"\xff\x4f\xff\x51": "JPEG 2000", b"8BPS": "Photoshop", b"\0\0\1\0": "ICO", b"%PDF": "PDF",
  b"<svg": "SVG", b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"DDS ": "DDS", b"qoif": "QOI",
  b"version https://git-lfs": "Git LFS pointer",
}  # fmt: skip


class DecodeError(ValueError):
  """An unusable image; `reason` is one of a few short phrases for counting."""

  def __init__(self, reason: str, detail: object = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
  """Properties of an encoded image that are known before decoding.

  Attributes:
    format: one of FORMATS.
    width: stored width in pixels, before the orientation is applied.
    height: stored height in pixels.
    orientation: EXIF orientation, 1 (upright) to 8.
    components: color components of a JPEG; 0 for other formats.
    scans: number of scans of a JPEG.
    has_end: whether a JPEG has its end marker.
    kept: byte ranges (start, stop) that affect pixels.
    head: bytes that replace everything before the first range.
    tail: bytes to append after the last range.
  """

  format: Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]
  width: int
  height: int
  orientation: int = 1
  components: int = 0
  scans: int = 1
  has_end: bool = True
  kept: tuple[tuple[int, int], ...] = ()
  head: bytes = b""
  tail: bytes = b""

  def without_metadata(self, data: bytes) -> bytes:
    """Return the encoded image without text, profiles, thumbnails and other metadata."""
    if not self.kept:
      return data
    return b"".join((self.head, *(data[start:stop] for start, stop in self.kept), self.tail))


def read_header(data: bytes) -> Header:
  """Read the header of an encoded image.

  Raises:
    DecodeError: if the bytes are not an image, are truncated before the pixels, or have an
      unsupported format, which the message names.
  """
  read = next((read for magic, read in _READERS.items() if data.startswith(magic)), None)
  if read is None or read is _webp and data[8:12] != b"WEBP":
    raise _unknown(data)
  try:
    header = read(data)
  except (struct.error, IndexError):
    raise DecodeError("truncated image", f"{len(data)} bytes end in the header") from None
  if not header.width or not header.height:
    raise DecodeError("broken header", f"{header.width} x {header.height} pixels")
  return header


def _unknown(data: bytes) -> DecodeError:
  if not data:
    return DecodeError("empty file")
  kind = next((name for magic, name in _OTHER_FORMATS.items() if data.startswith(magic)), None)
  if data[4:8] == b"ftyp":
    brand = data[8:12]
    kind = (
      "AVIF" if brand in (b"avif", b"avis") else "HEIC" if brand[:2] in (b"he", b"mi") else "video"
    )
  if kind:
    return DecodeError(f"unsupported {kind}", f"expected {', '.join(FORMATS)}")
  return DecodeError("unknown format", f"{data[:8]!r} is none of {', '.join(FORMATS)}")


def orientation(exif: bytes) -> int:
  """Return the orientation in an EXIF block, 1 (upright) to 8; 1 if it has none."""
  tiff = exif.removeprefix(_EXIF)
  order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
  if tiff[:4] not in (b"II*\0", b"MM\0*"):
    return 1
  first = int.from_bytes(tiff[4:8], order)
  count = int.from_bytes(tiff[first : first + 2], order)
  for start in range(first + 2, min(first + 2 + 12 * count, len(tiff) - 11), 12):
    if int.from_bytes(tiff[start : start + 2], order) == _ORIENTATION_TAG:
      size = {1: 1, 3: 2, 4: 4}.get(int.from_bytes(tiff[start + 2 : start + 4], order), 0)
      value = int.from_bytes(tiff[start + 8 : start + 8 + size], order)
      return value if 1 <= value <= 8 else 1
  return 1


def _jpeg(data: bytes) -> Header:
  position, end = 2, len(data)
  turned = width = height = components = frame = 0
  kept: list[tuple[int, int]] = []
  start = 0  # of the current kept range
  for _ in range(_MAX_PARTS):
    position = data.find(b"\xff", position)
    while position >= 0 and position + 1 < end and data[position + 1] == 0xFF:
      position += 1
    if position < 0 or position + 4 > end:
      raise DecodeError("truncated image", f"{end} bytes end before the pixels")
    marker = data[position + 1]
    if marker == 0xD9:
      raise DecodeError("broken header", "ends before the pixels")
    if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # no length
      position += 2
      continue
    after = position + 2 + (data[position + 2] << 8 | data[position + 3])
    if marker == 0xDA:
      break
    if marker in _JPEG_OTHER_FRAMES:
      kind = f"{_JPEG_OTHER_FRAMES[marker]} JPEG"
      raise DecodeError(f"unsupported {kind}", "expected baseline, extended or progressive")
    if marker in _JPEG_FRAMES:
      frame = marker
      precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
      if precision != 8:
        reason = "unsupported 12-bit JPEG" if precision == 12 else "broken header"
        raise DecodeError(reason, f"{precision} bits per sample, expected 8")
      if not height:
        raise DecodeError("unsupported JPEG", "the height is stored after the pixels")
    elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
      if marker == 0xE1 and not turned and data.startswith(_EXIF, position + 4):
        turned = orientation(data[position + 4 : after])
      # JFIF and Adobe segments define the color space. Pillow fails on truncated ones.
      if not (
        marker == 0xE0 and after - position >= 16 or marker == 0xEE and after - position >= 14
      ):
        kept.append((start, position))
        start = after
    position = after
  else:
    raise DecodeError("broken header", f"over {_MAX_PARTS} segments")
  if not frame:
    raise DecodeError("broken header", "no frame before the pixels")
  scans, has_end = 1, True
  if frame in (0xC2, 0xCA) or data[position + 4] < components:
    scans, has_end = _jpeg_scans(data, position)
  elif not data.endswith(JPEG_END):
    has_end = data.rfind(JPEG_END, position) >= 0
  return Header(
    "JPEG",
    width,
    height,
    turned or 1,
    components,
    scans,
    has_end,
    (*kept, (start, end)),
    tail=b"" if has_end else JPEG_END,
  )


def _jpeg_scans(data: bytes, position: int) -> tuple[int, bool]:
  """Return the number of scans from `position` on, and whether an end marker follows them."""
  scans = 0
  for _ in range(_MAX_PARTS):
    if data[position + 1] == 0xDA:
      scans += 1
      match = _AFTER_SCAN.search(data, position + 2)
    else:
      match = _AFTER_SCAN.search(
        data, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
      )
    if match is None:
      return scans, False
    position = match.start()
    if data[position + 1] == 0xD9:
      return scans, True
  raise DecodeError("broken image", f"over {_MAX_PARTS} segments between scans")


def _png(data: bytes) -> Header:
  turned, width, height = 1, 0, 0
  kept = [(0, len(png_chunks.SIGNATURE))]
  is_cut = False
  for number, chunk in enumerate(png_chunks.walk(data)):
    kind, start, stop = chunk
    length = stop - start - 12
    is_cut = stop > len(data) and kind in _PNG_PIXEL_CHUNKS
    if number == 0:
      if kind != b"IHDR":
        detail = "Apple's proprietary format (CgBI)" if kind == b"CgBI" else f"begins with {kind!r}"
        raise DecodeError("unsupported PNG" if kind == b"CgBI" else "broken header", detail)
      width, height = struct.unpack_from(">II", data, start + 8)
      kept.append((start, stop))
    elif kind in _PNG_PIXEL_CHUNKS or (
      kind == b"tRNS" and length in _PNG_TRANSPARENCY.get(data[25], ())
    ):
      kept.append((start, stop))
    elif kind == b"eXIf" and stop <= len(data) and png_chunks.has_valid_checksum(data, chunk):
      turned = orientation(data[start + 8 : stop - 4])
    if number >= _MAX_PARTS:
      raise DecodeError("broken header", f"over {_MAX_PARTS} chunks")
  if len(kept) == 1:
    raise DecodeError("truncated image", f"{len(data)} bytes end in the header")
  # Complete pixel data do not need the chunks after them.
  tail = b"" if is_cut else b"\0\0\0\0IEND\xaeB`\x82"
  return Header("PNG", width, height, turned, kept=tuple(kept), tail=tail)


def _webp(data: bytes) -> Header:
  turned, width, height, flags = 1, 0, 0, 0
  canvas = b""
  kept: list[tuple[int, int]] = []
  size = 4  # bytes after the RIFF size field
  for kind, start, stop in _riff_chunks(data, 12, len(data)):
    if kind == b"VP8X":
      flags = data[start]
      width, height = (
        int.from_bytes(data[start + i : start + i + 3], "little") + 1 for i in (4, 7)
      )
      canvas = data[start + 1 : start + 10]
    elif kind == b"EXIF":
      turned = orientation(data[start:stop])
    elif (
      kind == b"ANIM" or kind == b"ANMF" and not any(data[a : a + 4] == b"ANMF" for a, _ in kept)
    ):
      kept.append((start - 8, stop + stop % 2 - start % 2))
    elif kind in _WEBP_PIXEL_CHUNKS:
      kept.append((start - 8, stop + (stop - start) % 2))
      if not width:
        width, height = _webp_frame_size(kind, data[start : start + 10])
  kept = [(start, min(stop, len(data))) for start, stop in kept]
  head = b"WEBP"
  if canvas:
    head += struct.pack("<4sIB", b"VP8X", 10, flags & (_ANIMATION | _ALPHA)) + canvas
  size = len(head) + sum(stop - start for start, stop in kept)
  return Header(
    "WEBP", width, height, turned, kept=tuple(kept), head=struct.pack("<4sI", b"RIFF", size) + head
  )


def _riff_chunks(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
  """Yield (kind, start, stop) of the content of each chunk; the last may be truncated."""
  for _ in range(_MAX_PARTS):
    if position + 8 > end:
      return
    kind, length = struct.unpack_from("<4sI", data, position)
    yield kind, position + 8, position + 8 + length
    position += 8 + length + length % 2
  raise DecodeError("broken header", f"over {_MAX_PARTS} chunks")


def _webp_frame_size(kind: bytes, begin: bytes) -> tuple[int, int]:
  if kind == b"VP8L":
    bits = int.from_bytes(begin[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
  if kind == b"VP8 ":
    width, height = struct.unpack_from("<HH", begin, 6)
    return width & 0x3FFF, height & 0x3FFF
  return 0, 0


def _gif(data: bytes) -> Header:
  """Keep the first frame only; Pillow's parsing time is quadratic in the number of comments."""
  width, height, flags = struct.unpack_from("<HHB", data, 6)
  position = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
  kept = [(0, position)]
  blocks = 0
  while True:
    kind = data[position]
    if kind == 0x21:
      after, count = _gif_blocks(data, position + 2)
      if data[position + 1] == 0xF9:  # graphic control: transparency of the next frame
        kept.append((position, after))
    elif kind == 0x2C:
      left, top, w, h, local = struct.unpack_from("<HHHHB", data, position + 1)
      first = position + 11 + (6 << (local & 7) if local & 0x80 else 0)
      after, count = _gif_blocks(data, first)
      kept.append((position, after))
      # Pillow enlarges the canvas to contain the frame.
      size = max(width, left + w), max(height, top + h)
      return Header("GIF", *size, kept=tuple(kept), tail=b"\x3b")
    elif kind == 0x3B:
      raise DecodeError("broken image", "GIF without a frame")
    else:
      raise DecodeError("broken image", f"GIF block of unknown kind {kind}")
    position = after
    blocks += count
    if blocks > _MAX_GIF_BLOCKS:
      raise DecodeError("broken header", f"over {_MAX_GIF_BLOCKS} blocks")


def _gif_blocks(data: bytes, position: int) -> tuple[int, int]:
  """Return the end and the number of the sub-blocks that begin at `position`."""
  for count in range(_MAX_GIF_BLOCKS):
    if position >= len(data):
      return position, count
    length = data[position]
    position += 1 + length
    if not length:
      return position, count + 1
  raise DecodeError("broken image", f"over {_MAX_GIF_BLOCKS} blocks")


def _bmp(data: bytes) -> Header:
  size = struct.unpack_from("<I", data, 14)[0]
  if size == 12:
    width, height = struct.unpack_from("<HH", data, 18)
    return Header("BMP", width, height)
  width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
  if compression in (1, 2) and len(data) > _MAX_RLE_BYTES:
    raise DecodeError("too many bytes", f"{len(data)} > {_MAX_RLE_BYTES} of a run-length BMP")
  return Header("BMP", abs(width), abs(height))


_READERS: dict[bytes, Callable[[bytes], Header]] = {
  b"\xff\xd8\xff": _jpeg,
  png_chunks.SIGNATURE: _png,
  b"RIFF": _webp,
  b"GIF87a": _gif,
  b"GIF89a": _gif,
  b"BM": _bmp,
}
