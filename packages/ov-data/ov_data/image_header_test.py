import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
import pytest

from ov_data import decode, image_header
from ov_data.hashing import Uniforms
from ov_data.image_header import DecodeError, read_header


def _image(width=48, height=32):
  small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _encode(format="PNG", image=None, **options):
  buffer = io.BytesIO()
  (image or _image()).save(buffer, format, **options)
  return buffer.getvalue()


def _entry(rng, order):
  """Return an IFD entry with random tag (not the orientation), type, count and value."""
  tag = int(rng.choice([0x10F, 0x11A, 0x11B, 0x128, 0x8769, 0x8825, 0x927C, 0xA005, 0x9286]))
  kind = int(rng.integers(0, 20))
  count = int(rng.choice([0, 1, 2, 5, 1000, 2**31, 2**32 - 1]))
  return struct.pack(order + "HHII", tag, kind, count, int(rng.integers(0, 2**32)))


def _exif(rng, orientation):
  """Return an EXIF block with random tags around the orientation."""
  order = rng.choice(["<", ">"])
  entries = [_entry(rng, order) for _ in range(rng.integers(0, 6))]
  turned = struct.pack(order + "HHIHH", 0x112, 3, 1, orientation, 0)
  entries.insert(int(rng.integers(0, len(entries) + 1)), turned)
  mark = b"II*\0" if order == "<" else b"MM\0*"
  head = mark + struct.pack(order + "IH", 8, len(entries))
  return head + b"".join(entries) + rng.bytes(rng.integers(0, 40))


def _segment(marker, body):
  return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def _chunk(kind, body, valid=True):
  return (
    struct.pack(">I", len(body))
    + kind
    + body
    + struct.pack(">I", zlib.crc32(kind + body) ^ (not valid))
  )


def _riff(kind, body):
  return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


XMP = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6" \xff<'


def _jpeg_with_metadata(rng, orientation):
  jpeg = _encode("JPEG", quality=95)
  others = [
    _segment(0xE0, b"JFIF\0"[: rng.integers(0, 6)]),  # too short for JFIF
    _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
    _segment(0xE2, b"ICC_PROFILE\0" + rng.bytes(20)),
    _segment(0xE2, b"MPF\0" + rng.bytes(30)),
    _segment(0xED, b"Photoshop 3.0\x008BIM" + rng.bytes(9)),
    _segment(0xEE, b"Adobe"[: rng.integers(0, 6)]),
    _segment(0xFE, rng.bytes(rng.integers(0, 60_000))),
  ]
  others = [others[i] for i in rng.permutation(len(others))[: rng.integers(0, 8)]]
  others.insert(
    int(rng.integers(0, len(others) + 1)), _segment(0xE1, b"Exif\0\0" + _exif(rng, orientation))
  )
  return jpeg[:2] + b"".join(others) + jpeg[2:]


def _png_with_metadata(rng, orientation):
  png = _encode("PNG")
  exif = _chunk(b"eXIf", _exif(rng, orientation))
  others = [
    _chunk(b"tEXt", b"Comment\0" + rng.bytes(30), valid=rng.random() < 0.5),
    _chunk(b"tEXt", b"without an end"),
    _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"x" * 2_000_000)),
    _chunk(b"zTXt", b"Broken\0\0" + rng.bytes(9)),
    _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    _chunk(b"iTXt", b"\0"),
    _chunk(b"iCCP", b"name\0\0" + rng.bytes(12)),
    _chunk(b"pHYs", rng.bytes(rng.integers(0, 12))),
    _chunk(b"gAMA", rng.bytes(rng.integers(0, 5))),
    _chunk(b"acTL", rng.bytes(rng.integers(0, 9))),
    _chunk(b"tIME", rng.bytes(3)),
  ]
  others = [others[i] for i in rng.permutation(len(others))[: rng.integers(0, 8)]] + [exif]
  before = [others[i] for i in rng.permutation(len(others))]
  after = [before.pop() for _ in range(rng.integers(0, len(before) + 1))]
  end = len(png) - 12
  return png[:33] + b"".join(before) + png[33:end] + b"".join(after) + png[end:]


def _webp_with_metadata(rng, orientation):
  webp = _encode("WEBP", lossless=True)
  chunks = [
    _riff(b"EXIF", b"Exif\0\0"[: 6 * rng.integers(0, 2)] + _exif(rng, orientation)),
    _riff(b"XMP ", XMP),
    _riff(b"ICCP", rng.bytes(11)),
    _riff(b"odd!", rng.bytes(rng.integers(0, 50))),
  ]
  chunks = [chunks[0], *(chunks[i] for i in 1 + rng.permutation(3)[: rng.integers(0, 4)])]
  canvas = _riff(
    b"VP8X", struct.pack("<I", 0x2C) + struct.pack("<I", 47)[:3] + struct.pack("<I", 31)[:3]
  )
  body = b"WEBP" + canvas + webp[12:] + b"".join(chunks)
  return b"RIFF" + struct.pack("<I", len(body)) + body


MAKERS = {"JPEG": _jpeg_with_metadata, "PNG": _png_with_metadata, "WEBP": _webp_with_metadata}


@pytest.mark.parametrize("format", MAKERS)
@pytest.mark.filterwarnings("error")
def test_only_orientation_of_metadata_affects_pixels(format):
  # The pixels equal those of the image without metadata after applying the EXIF orientation.
  rng = np.random.default_rng(7)
  options = {"JPEG": dict(quality=95), "PNG": {}, "WEBP": dict(lossless=True)}[format]
  plain = np.asarray(decode.full(_encode(format, **options)))
  for _ in range(300):
    orientation = int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 65535]))
    data = MAKERS[format](rng, orientation)
    valid = orientation if 1 <= orientation <= 8 else 1
    assert read_header(data).orientation == valid
    want = decode._upright(plain, valid)
    np.testing.assert_array_equal(np.asarray(decode.full(data)), want)
    # Decoding for training and evaluation.
    assert decode.whole(data, 16).shape == (16, 16, 3)
    assert decode.random_crop(data, 16, Uniforms(0), decode.Crop()).shape == (16, 16, 3)


@pytest.mark.parametrize(
  "exif, want",
  [
    (b"", 1),
    (b"II*\0", 1),
    (b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x112, 3, 1, 6, 0), 6),
    (b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x112, 3, 1, 6, 0), 6),
    (b"Exif\0\0MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x112, 3, 1, 8, 0), 8),
    (b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x112, 4, 1, 3), 3),  # as LONG
    (b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x112, 10, 1, 6), 1),  # as a fraction
    (b"II*\0" + struct.pack("<IHHHII", 2**32 - 1, 1, 0x112, 3, 1, 6), 1),  # outside the block
    (b"II*\0" + struct.pack("<IH", 8, 65535), 1),
    (b"XX*\0" + struct.pack("<IHHHIHH", 8, 1, 0x112, 3, 1, 6, 0), 1),
  ],
)
def test_orientation(exif, want):
  assert image_header.orientation(exif) == want


def test_large_metadata_is_skipped_and_not_decoded():
  # 256 MiB of text once decompressed, 8 MB of profile, and a GIF with 60,000 comments.
  text = _chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(256 << 20)))
  profile = _chunk(b"iCCP", b"p\0\0" + bytes(8 << 20))
  png = _encode("PNG")
  gif = _encode("GIF")
  first_frame = gif.index(b"\x2c", 13 + (6 << (gif[10] & 7)))
  comment = b"\x21\xfe" + (b"\xff" + b"c" * 255) * 60_000 + b"\0"
  samples = {
    "PNG": (png, png[:33] + text + profile + png[33:]),
    "GIF": (gif, gif[:first_frame] + comment + gif[first_frame:]),
  }
  for format, (plain, large) in samples.items():
    tracemalloc.start()
    start = time.process_time()
    got = np.asarray(decode.full(large))
    assert time.process_time() - start < 5, format
    assert tracemalloc.get_traced_memory()[1] < 200 << 20, format
    tracemalloc.stop()
    np.testing.assert_array_equal(got, np.asarray(decode.full(plain)))


def test_profiles_of_real_size_are_dropped():
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  info = PngImagePlugin.PngInfo()
  info.add_text("parameters", "a castle, 8k " * 200_000, zip=True)
  for format, options in {"PNG": dict(pnginfo=info), "JPEG": {}, "WEBP": {}}.items():
    data = _encode(format, icc_profile=profile, **options)
    header = read_header(data)
    assert profile not in header.without_metadata(data)
    assert len(header.without_metadata(data)) < len(data) - 400
    plain = np.asarray(decode.full(_encode(format)))
    np.testing.assert_array_equal(np.asarray(decode.full(data)), plain)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_used(mode, progressive):
  data = _encode("JPEG", _image().convert(mode), quality=95, progressive=progressive)
  want = np.asarray(decode.full(data))
  for cut in (1, 2):
    assert not read_header(data[:-cut]).has_end
    np.testing.assert_array_equal(np.asarray(decode.full(data[:-cut])), want)
    decode.whole(data[:-cut], 16)
  for cut in (8, 60, 300):
    with pytest.raises(DecodeError) as error:
      decode.full(data[:-cut])
    assert error.value.reason == "truncated image"
  # Data after the end of an image is ignored.
  np.testing.assert_array_equal(np.asarray(decode.full(data + bytes(100))), want)


def test_other_formats_without_their_end():
  png, gif = _encode("PNG"), _encode("GIF")
  for whole, cuts in ((png, (1, 4, 12)), (gif, (1,))):
    want = np.asarray(decode.full(whole))
    for cut in cuts:
      np.testing.assert_array_equal(np.asarray(decode.full(whole[:-cut])), want)
  for data in (png[:-40], gif[:-60], _encode("WEBP")[:-20], _encode("BMP")[:-20]):
    with pytest.raises(DecodeError, match="truncated image|broken image"):
      decode.full(data)


def test_a_webp_whose_metadata_are_cut_off_is_used():
  data = _webp_with_metadata(np.random.default_rng(1), 1)
  end = data.index(b"EXIF")
  want = np.asarray(decode.full(data))
  np.testing.assert_array_equal(np.asarray(decode.full(data[: end + 12])), want)


def _scans(side, copies, mode="L"):
  """Return a progressive JPEG whose last scan is repeated."""
  data = _encode("JPEG", Image.new(mode, (side, side), 128), progressive=True, quality=50)
  last = data.rindex(b"\xff\xda")
  return data[:-2] + data[last:-2] * copies + data[-2:]


def test_scans_are_counted_and_limited():
  for copies in (0, 1, 50):
    data = _scans(64, copies)
    assert read_header(data).scans == 6 + copies
    assert decode.whole(data, 16).shape == (16, 16, 3)
  assert read_header(_encode("JPEG")).scans == 1
  assert read_header(_encode("JPEG", progressive=True)).scans == 10
  for side, copies in ((64, 300), (5000, 40)):  # too many scans; too many scans x pixels
    start = time.process_time()
    for read in (lambda d: decode.whole(d, 16), decode.full):
      with pytest.raises(DecodeError) as error:
        read(_scans(side, copies))
      assert error.value.reason == "too many scans"
    assert time.process_time() - start < 3


def test_scans_of_a_thumbnail_do_not_count():
  thumbnail = _scans(64, 200)
  data = _encode("JPEG", progressive=True)
  data = data[:2] + _segment(0xE1, b"Exif\0\0" + thumbnail) + data[2:]
  assert read_header(data).scans == 10
  decode.full(data)


def _png_of(width, height):
  """Return a valid PNG of one color with 1 bit per pixel."""
  rows = zlib.compressobj(9)
  row = b"\0" + bytes((width + 7) // 8)
  body = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
  header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  "width, height, reason",
  [
    (63_000_000, 1, "too long a side"),
    (1, 63_000_000, "too long a side"),
    (70_000, 80, "too long a side"),
    (60_000, 1, "too extreme an aspect ratio"),
    (1, 60_000, "too extreme an aspect ratio"),
    (9_000, 9_000, "too many pixels"),
  ],
)
def test_shapes_that_cost_too_much(width, height, reason):
  data = _png_of(width, min(height, 10_000))
  header = struct.pack(">II", width, height) + data[24:29]
  data = data[:8] + _chunk(b"IHDR", header) + data[33:]
  for read in (
    lambda d: decode.whole(d, 16),
    lambda d: decode.random_crop(d, 16, Uniforms(0), decode.Crop()),
    decode.full,
  ):
    with pytest.raises(DecodeError) as error:
      read(data)
    assert error.value.reason == reason
    assert f"{width} x {height}" in str(error.value)


@pytest.mark.parametrize("width, height", [(60_000, 60), (60, 60_000), (1, 900), (900, 1), (1, 1)])
@pytest.mark.parametrize("size", [8, 224])
def test_long_shapes_within_the_limits_are_used(width, height, size):
  data = _png_of(width, height)
  assert decode.whole(data, size).shape == (size, size, 3)
  assert decode.whole(data, size, "squash").shape == (size, size, 3)
  assert decode.random_crop(data, size, Uniforms(0), decode.Crop()).shape == (size, size, 3)


def test_a_webp_canvas_is_checked_before_it_is_allocated():
  body = b"WEBP" + _riff(b"VP8X", struct.pack("<I", 2) + b"\xff\xff\xff" * 2) + _encode("WEBP")[12:]
  with pytest.raises(DecodeError, match="too many pixels"):
    decode.full(b"RIFF" + struct.pack("<I", len(body)) + body)


def _with_precision(bits):
  data = bytearray(_encode("JPEG"))
  data[data.index(b"\xff\xc0") + 4] = bits
  return bytes(data)


def _with_frame(marker):
  data = bytearray(_encode("JPEG"))
  data[data.index(b"\xff\xc0") + 1] = marker
  return bytes(data)


UNSUPPORTED = {
  "unsupported 12-bit JPEG: 12 bits per sample, expected 8": _with_precision(12),
  "unsupported lossless JPEG: expected baseline": _with_frame(0xC3),
  "unsupported hierarchical JPEG": _with_frame(0xC5),
  "unsupported PNG: Apple's proprietary format": b"\x89PNG\r\n\x1a\n"
  + _chunk(b"CgBI", bytes(4))
  + _encode()[8:],
  "unsupported TIFF: expected JPEG, PNG": _encode("TIFF"),
  "unsupported AVIF": b"\0\0\0\x20ftypavif" + bytes(40),
  "unsupported HEIC": b"\0\0\0\x20ftypheic" + bytes(40),
  "unsupported JPEG 2000": _encode("JPEG2000"),
  "unsupported gzip": b"\x1f\x8b" + bytes(20),
  "unsupported Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
  "unsupported SVG": b"<svg xmlns=''/>",
  "unknown format: b'<html>40' is none of": b"<html>404</html>",
  "empty file": b"",
  "broken image: cannot identify image file": _encode()[:8]
  + _chunk(b"IHDR", _encode()[16:25] + b"\5" + _encode()[26:29])
  + _encode()[33:],
  "truncated image: 3 bytes": b"\xff\xd8\xff",
  "truncated image: 8 bytes end in the header": _encode("PNG")[:8],
  "truncated image: 20 bytes end in the header": _encode("PNG")[:20],
  "broken header: 0 x 32 pixels": _encode()[:16] + bytes(4) + _encode()[20:],
  "broken image: GIF without a frame": b"GIF89a" + bytes(7) + b";",
}


@pytest.mark.parametrize("content", [b"", b"\0", bytes(300)])
def test_transparency_of_a_wrong_size_is_skipped(content):
  data = _encode()
  odd = data[:33] + _chunk(b"tRNS", content) + data[33:]
  np.testing.assert_array_equal(decode.whole(odd, 8), decode.whole(data, 8))


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_the_reason_names_the_unsupported_feature(message):
  with pytest.raises(DecodeError) as error:
    decode.whole(UNSUPPORTED[message], 8)
  assert str(error.value).startswith(message)
  assert message.startswith(error.value.reason) and " object at 0x" not in str(error.value)


@pytest.mark.parametrize(
  "data",
  [
    b"\xff\xd8" + b"\xff\xfe\0\2" * (1 << 20),
    b"\xff\xd8" + b"\xff" * (4 << 20),
    b"\xff\xd8\xff" + bytes(4 << 20),
    _encode("PNG")[:33] + _chunk(b"odd!", b"") * (1 << 18),
    b"GIF89a" + bytes(7) + b"\x21\xfe\0" * (1 << 20),
    b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\1c" * (2 << 20),
    b"RIFF\0\0\0\0WEBP" + b"odd!\0\0\0\0" * (1 << 18),
    _encode("JPEG", progressive=True)[:-2] + b"\xff\xc4\0\2" * (1 << 18),
  ],
  ids=["segments", "fill bytes", "garbage", "chunks", "extensions", "blocks", "riff", "tables"],
)
def test_the_walk_is_bounded(data):
  start = time.process_time()
  with pytest.raises(DecodeError):
    decode.whole(data, 8)
  assert time.process_time() - start < 3


def test_a_run_length_bmp_is_limited():
  data = bytearray(_encode("BMP") + bytes(5 << 20))
  data[30] = 1
  with pytest.raises(DecodeError, match="run-length BMP"):
    decode.whole(bytes(data), 8)
