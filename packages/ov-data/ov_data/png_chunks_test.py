"""A PNG with a flipped bit has the same pixels or is rejected."""

from collections import Counter
import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from ov_data import decode, image_header, png_chunks


def _chunk(kind, content, checksum_error=0):
  checksum = zlib.crc32(kind + content) ^ checksum_error
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _png(image, before_pixels=b"", after_pixels=b"", **options):
  """Return a PNG whose pixels are in three chunks, with other chunks around them."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG", **options)
  data = buffer.getvalue()
  result = png_chunks.SIGNATURE
  for kind, start, stop in png_chunks.walk(data):
    content = data[start + 8 : stop - 4]
    if kind == b"IDAT":
      third = len(content) // 3
      parts = content[:third], content[third : 2 * third], content[2 * third :]
      result += before_pixels + b"".join(_chunk(b"IDAT", part) for part in parts) + after_pixels
    else:
      result += _chunk(kind, content)
  return result


_NOISE = np.random.default_rng(0).integers(0, 256, (9, 11, 4), np.uint8)
_IMAGES = {
  "RGB": dict(
    image=Image.fromarray(_NOISE[..., :3]), transparency=tuple(_NOISE[4, 4, :3].tolist())
  ),
  "RGBA": dict(image=Image.fromarray(_NOISE)),
  "P": dict(
    image=Image.fromarray(_NOISE[..., :3]).quantize(16), transparency=bytes(range(0, 160, 10))
  ),
}
_EXIF = b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x112, 3, 1, 6, 0)
_ANCILLARY = {
  b"tEXt": b"Comment\0a castle",
  b"iCCP": b"name\0\0" + zlib.compress(b"profile"),
  b"gAMA": struct.pack(">I", 45_455),
  b"pHYs": bytes(9),
  b"tIME": bytes(7),
  b"acTL": struct.pack(">II", 1, 0),
  b"prVt": b"a private chunk",
}


def _pixels(data):
  return np.asarray(decode.full(data))


@pytest.mark.parametrize("mode", _IMAGES)
def test_no_flipped_bit_changes_pixels(mode):
  data = _png(before_pixels=_chunk(b"tEXt", b"Comment\0a castle"), **_IMAGES[mode])
  expected = _pixels(data)
  results = Counter()
  for bit in range(8 * len(data)):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
      np.testing.assert_array_equal(_pixels(bytes(damaged)), expected, f"byte {bit // 8}")
      results["same"] += 1
    except decode.DecodeError:
      results["refused"] += 1
  assert results["same"] >= 8 * len("Comment\0a castle")
  assert results["refused"] > 4 * len(data)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"IEND"])
@pytest.mark.parametrize("byte", [-1, -4, -5])
def test_a_wrong_checksum_of_a_chunk_that_affects_pixels(kind, byte):
  data = bytearray(_png(**_IMAGES["P"]))
  chunk = next(chunk for chunk in png_chunks.walk(bytes(data)) if chunk.kind == kind)
  data[chunk.stop + byte] ^= 1
  with pytest.raises(decode.DecodeError) as error:
    decode.full(bytes(data))
  if byte == -5 and kind == b"IEND":
    assert error.value.reason == "broken image"  # damaged chunk type
    return
  assert str(error.value) == (
    f"broken image: wrong checksum of the PNG chunk {kind!r} at byte {chunk.start}"
  )
  for read in (lambda d: decode.whole(d, 8), lambda d: decode.whole(d, 8, "squash")):
    with pytest.raises(decode.DecodeError, match="wrong checksum"):
      read(bytes(data))


@pytest.mark.parametrize("kind", _ANCILLARY)
def test_a_wrong_checksum_of_another_chunk_is_ignored(kind):
  expected = _pixels(_png(**_IMAGES["P"]))
  odd = _chunk(kind, _ANCILLARY[kind], checksum_error=1)
  for place in ("before_pixels", "after_pixels"):
    np.testing.assert_array_equal(_pixels(_png(**_IMAGES["P"], **{place: odd})), expected)


def test_an_orientation_with_a_wrong_checksum_is_not_applied():
  for error, orientation in ((0, 6), (1, 1)):
    data = _png(**_IMAGES["RGBA"], before_pixels=_chunk(b"eXIf", _EXIF, error))
    assert image_header.read_header(data).orientation == orientation


def test_an_unknown_critical_chunk():
  """It does not affect pixels, but its type may be damaged."""
  expected = _pixels(_png(**_IMAGES["RGBA"]))
  whole = _png(**_IMAGES["RGBA"], before_pixels=_chunk(b"ABCD", b"12"))
  np.testing.assert_array_equal(_pixels(whole), expected)
  broken = _png(**_IMAGES["RGBA"], before_pixels=_chunk(b"ABCD", b"12", checksum_error=1))
  with pytest.raises(decode.DecodeError, match="wrong checksum of the PNG chunk b'ABCD'"):
    decode.full(broken)


def test_bytes_after_the_end_do_not_matter():
  data = _png(**_IMAGES["RGBA"])
  np.testing.assert_array_equal(_pixels(data + b"\0\0\0\1IDATx" + bytes(90)), _pixels(data))


def test_limits_precede_checksums():
  data = bytearray(_png(**_IMAGES["RGBA"]))
  data[16] = 0x40  # over a billion pixels in a row
  with pytest.raises(decode.DecodeError, match="too many pixels"):
    decode.full(bytes(data))
