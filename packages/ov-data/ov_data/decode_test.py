import io
import os
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest
import simplejpeg

from ov_data import decode, image_header, throughput_report
from ov_data.hashing import Uniforms


def _photo(width=96, height=64, seed=0):
  """A smooth colour picture."""
  small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _encode(image, format="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def _decode_both(data, size=32):
  return decode.random_crop(data, size, Uniforms(0), decode.Crop()), decode.whole(data, size)


def _difference(a, b):
  return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


@pytest.mark.parametrize("format", decode.FORMATS)
def test_formats(format):
  image = _photo()
  for pixels in _decode_both(_encode(image, format)):
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
  want = decode.whole(_encode(image), 32)
  limit = 12 if format == "GIF" else 4  # GIF has 256 colours, the lossy ones quantise
  assert _difference(decode.whole(_encode(image, format), 32), want).mean() < limit


MODES = {
  "L": ("PNG", lambda image: image.convert("L")),
  "L jpeg": ("JPEG", lambda image: image.convert("L")),
  "1": ("PNG", lambda image: image.convert("1")),
  "LA": ("PNG", lambda image: image.convert("LA")),
  "RGBA": ("PNG", lambda image: image.convert("RGBA")),
  "RGBA webp": ("WEBP", lambda image: image.convert("RGBA")),
  "P": ("PNG", lambda image: image.quantize(200)),
  "CMYK": ("JPEG", lambda image: image.convert("CMYK")),
  "I;16": ("PNG", lambda image: Image.fromarray(np.asarray(image.convert("L")).astype("u2") * 257)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
  format, convert = MODES[mode]
  image = convert(_photo())
  grey = mode.startswith(("L", "1", "I"))
  want = decode.whole(_encode(_photo().convert("L" if grey else "RGB")), 32)
  crop, pixels = _decode_both(_encode(image, format))
  assert crop.shape == pixels.shape == (32, 32, 3)
  limit = 25 if mode == "1" else 6  # one bit is dithered
  assert _difference(pixels, want).mean() < limit
  if grey:
    assert (pixels == pixels[..., :1]).all()


def test_transparency_lies_over_white():
  image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
  assert (decode.whole(_encode(image), 4) == 255).all()
  image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
  assert abs(int(decode.whole(_encode(image), 4)[0, 0, 0]) - 127) <= 1
  palette = Image.new("P", (8, 8), 0)
  palette.putpalette([9, 9, 9] + [0] * 765)
  assert (decode.whole(_encode(palette, transparency=0), 4) == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
  options = dict(save_all=True, append_images=frames[1:])
  pixels = decode.whole(_encode(frames[0], format, **options), 4)
  assert _difference(pixels, np.broadcast_to((255, 0, 0), (4, 4, 3))).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
  image = _photo(96, 64)
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = _encode(image, "JPEG", exif=exif, quality=95)
  stored = Image.fromarray(simplejpeg.decode_jpeg(data, fastdct=True))
  stored.getexif()[0x0112] = orientation
  upright = ImageOps.exif_transpose(stored)
  want = decode.whole(_encode(upright), 32)
  np.testing.assert_array_equal(decode.whole(data, 32), want)
  # The crop is drawn in the upright picture: the same as from upright pixels.
  crop = decode.random_crop(data, 32, Uniforms(4), decode.Crop())
  want = decode.random_crop(_encode(upright), 32, Uniforms(4), decode.Crop())
  np.testing.assert_array_equal(crop, want)


@pytest.mark.parametrize("size", [24, 50, 96, 200])
def test_scaled_decoding_keeps_antialiasing(size):
  # Fine texture is where a scaled decode could alias. Against the full decode of the same JPEG the
  # mean difference stays within 3 of 255, and a resize without antialiasing is far outside.
  rng = np.random.default_rng(0)
  texture = rng.integers(0, 256, (384, 512, 3), np.uint8)
  image = Image.blend(_photo(512, 384), Image.fromarray(texture), 0.3)
  data = _encode(image, "JPEG", quality=90)
  fast = decode.random_crop(data, size, Uniforms(1), decode.Crop())
  full = decode.random_crop(_encode(Image.open(io.BytesIO(data))), size, Uniforms(1), decode.Crop())
  assert _difference(fast, full).mean() < 3
  box = decode.Crop().box(512, 384, Uniforms(1))
  aliased = Image.open(io.BytesIO(data)).resize((size, size), Image.Resampling.NEAREST, box)
  assert _difference(aliased, full).mean() > 6


def _exif(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


JPEGS = {  # of an odd size, so that no scale divides it
  "4:2:0": dict(),
  "4:4:4": dict(subsampling=0, quality=95),
  "4:2:2": dict(subsampling=1),
  "progressive": dict(progressive=True),
  "restart markers": dict(restart_marker_blocks=3),
  "grey": dict(mode="L"),
  "turned": dict(exif=_exif(6)),
  "several pictures": dict(format="MPO", save_all=True, append_images=[_photo(60, 60)]),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_skip_pillow_and_come_out_equal(kind, monkeypatch):
  options = {"format": "JPEG", "mode": "RGB", **JPEGS[kind]}
  data = _encode(_photo(203, 157, seed=1).convert(options.pop("mode")), **options)
  sizes = (8, 20, 40, 70, 150)  # decoded at 1/8, 1/4, 1/2, 1/1
  with monkeypatch.context() as patch:
    patch.setattr(simplejpeg, "decode_jpeg", _fail)
    want = [decode.random_crop(data, size, Uniforms(5), decode.Crop()) for size in sizes]
    whole = np.asarray(decode.full(data))
  monkeypatch.setattr(decode, "_pillow", _fail)
  np.testing.assert_array_equal(np.asarray(decode.full(data)), whole)
  for size, pixels in zip(sizes, want):
    got = decode.random_crop(data, size, Uniforms(5), decode.Crop())
    # 8 x 8 blocks, at 1/2 those of chroma, go through the fast DCT, which Pillow does not offer.
    assert _difference(got, pixels).max() <= (0 if size <= 20 else 8)


def _fail(*_, **__):
  raise ValueError("not wanted here")


def test_cmyk_jpegs_are_decoded_by_pillow(monkeypatch):
  monkeypatch.setattr(simplejpeg, "decode_jpeg", _fail)
  data = _encode(_photo().convert("CMYK"), "JPEG")
  want = decode.random_crop(_encode(_photo()), 24, Uniforms(0), decode.Crop())
  assert _difference(decode.random_crop(data, 24, Uniforms(0), decode.Crop()), want).mean() < 6


@pytest.mark.parametrize("size", [20, 60, 120, 160])
def test_fine_rings_come_out_grey(size):
  # Rings that grow finer from the middle to the edge, where they are 2.9 pixels apart (2.05 in the
  # corners). Where a ring is finer than a new pixel grey is right, and moire is wrong. The triangle
  # leaves 1% of it, rounded; what a scaled decode leaves comes from the borders of blocks, and is
  # at most 28 of 127, 2.3 in the mean. Interpolation after it leaves 42 to 75, 3.5 to 18.
  side, period = 512, 2.9
  y, x = np.mgrid[:side, :side] - (side - 1) / 2
  plate = 127.5 + 127.5 * np.cos(np.pi * (x * x + y * y) / (period * side / 2))
  image = Image.fromarray(plate.astype(np.uint8)).convert("RGB")
  data = _encode(image, "JPEG", quality=95)
  pixels = decode.random_crop(data, size, Uniforms(0), decode.Crop(area=(1, 1), aspect=(1, 1)))
  pixel = side / size
  y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * pixel
  too_fine = np.hypot(x, y) > period * side / 2 / (0.9 * pixel)
  difference = _difference(pixels, 127)[too_fine]
  assert difference.max() < 32 and difference.mean() < 3
  plain = image.resize((size, size), Image.Resampling.NEAREST)
  assert _difference(plain, 127)[too_fine].mean() > 60


@pytest.mark.parametrize(
  "size, mean, largest", [(20, 1.5, 9), (40, 1.5, 11), (84, 1.8, 14), (160, 3.8, 32), (224, 0.4, 2)]
)
def test_pixels_are_near_those_of_a_full_decode(size, mean, largest):
  # Noise with the spectrum of photos, and more of it at high frequencies. Bounds are 1.5 times what
  # is found: decoded at 1/8, 1/4 or 1/8, 1/2, 1/2 or 1/1, and 1/1 where only rounding differs.
  rng = np.random.default_rng(0)
  jpegs = [throughput_report.encode(throughput_report.photo_like_noise(rng)) for _ in range(4)]
  found = throughput_report.difference(jpegs, size)
  assert found[0] < mean and found[2] < largest


def test_crop_is_a_function_of_its_key():
  data = _encode(_photo())
  one = decode.random_crop(data, 32, Uniforms(3, 14), decode.Crop())
  np.testing.assert_array_equal(one, decode.random_crop(data, 32, Uniforms(3, 14), decode.Crop()))
  assert _difference(one, decode.random_crop(data, 32, Uniforms(3, 15), decode.Crop())).max() > 0


@pytest.mark.parametrize("width, height", [(512, 384), (200, 300), (64, 64), (7, 5), (1, 1)])
def test_crop_boxes_keep_their_promise(width, height):
  crop = decode.Crop()
  for index in range(300):
    left, top, right, bottom = crop.box(width, height, Uniforms(index))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    share = (right - left) * (bottom - top) / (width * height)
    assert 0.4 <= share <= 1
    if share < 1 and min(width, height) > 50:
      assert 0.73 < (right - left) / (bottom - top) < 1.36  # whole pixels


def test_crop_falls_back_to_the_whole_image():
  assert decode.Crop().box(1000, 100, Uniforms(0)) == (0, 0, 1000, 100)


def test_crops_are_distributed_as_tensorflows():
  tf = pytest.importorskip("tensorflow")
  n, width, height = 4000, 512, 384

  @tf.function
  def draw(seeds):
    def box(seed):
      begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        [height, width, 3],
        tf.zeros([0, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(0.75, 1.33),
        area_range=(0.4, 1.0),
        use_image_if_no_bounding_boxes=True,
      )
      return tf.concat([begin[1::-1], begin[1::-1] + size[1::-1]], 0)

    return tf.map_fn(box, seeds, fn_output_signature=tf.int32)

  theirs = draw(np.stack([np.arange(n), np.arange(n)], 1).astype(np.int32)).numpy()
  ours = np.array([decode.Crop().box(width, height, Uniforms(i)) for i in range(n)])
  for statistic in (
    lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / (width * height),
    lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
    lambda b: b[:, 0] / width,
    lambda b: b[:, 1] / height,
  ):
    a, b = statistic(ours), statistic(theirs)
    for quantile in (0.1, 0.5, 0.9):  # of 4000 draws: standard error below 0.005
      assert abs(np.quantile(a, quantile) - np.quantile(b, quantile)) < 0.02


@pytest.mark.parametrize("width, height", [(100, 60), (60, 100), (85, 84), (300, 40), (20, 30)])
def test_whole_equals_tensorflow(width, height):
  tf = pytest.importorskip("tensorflow")
  image, size = _photo(width, height), 48
  ratio = np.float32(size) / np.float32(min(width, height))
  shape = [int(np.round(np.float32(side) * ratio)) for side in (height, width)]
  resized = tf.image.resize(np.asarray(image), shape, "bilinear", antialias=True).numpy()
  top, left = ((side - size) // 2 for side in shape)
  want = resized[top : top + size, left : left + size].astype(np.uint8)
  difference = _difference(decode.whole(_encode(image), size), want)
  # Both sum in float32, in another order: a value on the border of two integers may fall to
  # either side, nothing more.
  assert difference.max() <= 1 and difference.mean() < 0.02
  squashed = tf.image.resize(np.asarray(image), (size, size), "bilinear", antialias=True).numpy()
  difference = _difference(decode.whole(_encode(image), size, "squash"), squashed.astype(np.uint8))
  assert difference.max() <= 1 and difference.mean() < 0.02


def _golden():
  """Arrays of the published preprocessing, and the folder of the pictures behind them."""
  places = [pathlib.Path(os.environ["OV_GOLDEN"])] if os.environ.get("OV_GOLDEN") else []
  places += [parent / "shared" / "golden" for parent in pathlib.Path(__file__).absolute().parents]
  for place in places:
    if (place / "eval_preprocessing.npz").is_file() and (place.parent / "data").is_dir():
      return np.load(place / "eval_preprocessing.npz"), place.parent / "data"
  pytest.skip(
    "SKIPPED: eval_preprocessing.npz and ../data beside it not found; set OV_GOLDEN to its folder"
  )


@pytest.mark.parametrize("size", [84, 160])
def test_golden_evaluation_preprocessing(size):
  golden, data = _golden()
  for number, file in enumerate(golden["files"]):
    difference = _difference(
      decode.whole((data / str(file)).read_bytes(), size), golden[f"{number}_{size}"]
    )
    # Both sum in float32, in another order, and cut fractions off.
    assert difference.max() <= 1 and difference.mean() < 0.02, (file, difference.max())


def test_photos_are_decoded_and_fitted_as_by_tensorflow():
  # The released code decodes with TensorFlow, whose default is the fast DCT.
  tf = pytest.importorskip("tensorflow")
  _, data = _golden()
  files = sorted(data.rglob("*.jpg"))[::15]
  assert len(files) > 100
  for file in files:
    jpeg = file.read_bytes()
    image = tf.io.decode_jpeg(jpeg, channels=3).numpy()
    np.testing.assert_array_equal(decode._decoded(jpeg, image_header.read_header(jpeg)), image)
    squashed = tf.image.resize(image, (84, 84), "bilinear", antialias=True).numpy()
    assert _difference(decode.whole(jpeg, 84, "squash"), squashed.astype(np.uint8)).max() <= 1


BROKEN = {
  "unknown format": b"<html>404</html>",
  "truncated image": _encode(_photo(), "JPEG")[:-300],
  "too many pixels": _encode(Image.new("1", (9000, 9000))),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_reasons(reason):
  for read in (
    lambda data: decode.whole(data, 8),
    lambda data: decode.random_crop(data, 8, Uniforms(0), decode.Crop()),
  ):
    with pytest.raises(decode.DecodeError, match=reason) as error:
      read(BROKEN[reason])
    assert error.value.reason == reason


def test_a_bomb_is_not_even_opened():
  # The header alone claims 50,000 x 50,000 pixels.
  header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
  bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
  bomb += struct.pack(">I", zlib.crc32(header)) + _encode(_photo())[33:]
  with pytest.raises(decode.DecodeError, match="too many pixels"):
    decode.whole(bomb, 8)


def test_limits():
  data = _encode(_photo())
  with pytest.raises(decode.DecodeError, match="too many bytes: .* > 100"):
    decode.whole(data, 8, limits=decode.Limits(max_bytes=100))
  with pytest.raises(decode.DecodeError, match="too many pixels: 96 x 64"):
    decode.whole(data, 8, limits=decode.Limits(max_pixels=96 * 64 - 1))


@pytest.mark.parametrize("format", decode.FORMATS)
def test_damage_never_raises_anything_else(format):
  # Cut and flipped at random: an image or a DecodeError, never another exception.
  data = _encode(_photo(), format)
  failures = 0
  for damaged in _damaged(data, 60):
    try:
      decode.whole(damaged, 8)
    except decode.DecodeError as error:
      assert error.reason in (
        "unknown format",
        "truncated image",
        "broken image",
        "broken header",
        "empty file",
        "too many pixels",
        "too long a side",
        "too extreme an aspect ratio",
        "too many bytes",
        "too many scans",
        "unsupported JPEG",
        "unsupported 12-bit JPEG",
        "unsupported lossless JPEG",
        "unsupported hierarchical JPEG",
      )
      failures += 1
  assert failures > 10


def _damaged(data, count):
  rng = np.random.default_rng(1)
  for _ in range(count):
    damaged = bytearray(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.7 else data)
    for _ in range(rng.integers(0, 4)):
      damaged[rng.integers(len(damaged))] = rng.integers(256)
    yield bytes(damaged)


@pytest.mark.parametrize("options", [dict(), dict(progressive=True)], ids=["plain", "progressive"])
def test_damaged_jpegs_are_what_pillow_makes_of_them(options, monkeypatch):
  # The same pixels, or refused for the same reason.
  def pixels(data):
    try:
      return np.asarray(decode.full(data)).tobytes()
    except decode.DecodeError as error:
      return error.reason

  data = list(_damaged(_encode(_photo(), "JPEG", **options), 300))
  got = [pixels(jpeg) for jpeg in data]
  monkeypatch.setattr(simplejpeg, "decode_jpeg", _fail)
  for jpeg, ours in zip(data, got):
    pillows = pixels(jpeg)
    if ours != pillows:  # all pixels are there, and only the end marker is cut off
      assert pillows == "truncated image"
      assert ours == pixels(jpeg + image_header.JPEG_END)
  assert {"truncated image", "broken image", "unknown format"} <= set(got)
  assert sum(isinstance(one, bytes) for one in got) > 30


def test_whole_rejects_an_unknown_fit():
  with pytest.raises(ValueError, match="fit='crop'"):
    decode.whole(_encode(_photo()), 8, "crop")


def test_crop_rejects_impossible_ranges():
  with pytest.raises(ValueError, match="area="):
    decode.Crop(area=(0.5, 0.4))
  with pytest.raises(ValueError, match="aspect="):
    decode.Crop(aspect=(0, 1))
