import io

import numpy as np
from PIL import Image, ImageDraw
import pytest

from ov_data import decode
from ov_data.perceptual_hash import SIDE, perceptual_hash


def _drawing(seed, side=256):
  random = np.random.default_rng(seed)
  color = lambda: tuple(random.integers(0, 256, 3).tolist())
  image = Image.new("RGB", (side, side), color())
  draw = ImageDraw.Draw(image)
  for number in range(8):
    left, top = random.integers(-20, side - 20, 2).tolist()
    width, height = random.integers(20, side // 2, 2).tolist()
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((left, top, left + width, top + height), fill=color())
  return image


def _hash(image, kind="JPEG", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return perceptual_hash(decode.thumbnail(file.getvalue(), SIDE)[0])


def _distance(one, other):
  return (one ^ other).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formula(seed):
  """Compare with the definition of the DCT-II of the gray image, bit by bit."""
  pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
  gray = pixels[..., 0] * 0.299 + pixels[..., 1] * 0.587 + pixels[..., 2] * 0.114
  at = (2 * np.arange(SIDE) + 1) * np.pi / (2 * SIDE)
  waves = [np.outer(np.cos(u * at), np.cos(v * at)) for u in range(8) for v in range(8)]
  low = np.array([(gray * wave).sum() for wave in waves])
  low.reshape(8, 8)[0] /= np.sqrt(2)  # the orthonormal weights, up to a common factor
  low.reshape(8, 8)[:, 0] /= np.sqrt(2)
  expected = sum(1 << bit for bit in range(1, 64) if low[bit] > np.median(low[1:]))
  assert perceptual_hash(pixels) == expected
  assert expected.bit_count() == 31  # half of the 63 bits are above the median


def test_copies_are_close_and_other_images_are_not():
  """Distances of 60 drawings. Random hashes differ by 31 bits on average."""
  images = [_drawing(seed) for seed in range(60)]
  hashes = [_hash(image, quality=95) for image in images]
  for image, expected in zip(images, hashes):
    assert _distance(_hash(image, quality=40), expected) <= 6
    assert _distance(_hash(image, "PNG"), expected) <= 6
    assert _distance(_hash(image.resize((130, 130)), quality=90), expected) <= 6
    assert _distance(_hash(image.resize((700, 500)), quality=90), expected) <= 6
    darker = Image.fromarray((np.asarray(image) * 0.8).astype(np.uint8))
    assert _distance(_hash(darker, quality=95), expected) <= 6
  between = [_distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
  assert min(between) > 6 and 28 < np.mean(between) < 34


def test_thumbnail_has_the_size_of_the_upright_image():
  exif = Image.Exif()
  exif[274] = 6  # rotated by 90 degrees
  file = io.BytesIO()
  _drawing(0).resize((90, 40)).save(file, "JPEG", exif=exif)
  pixels, width, height = decode.thumbnail(file.getvalue(), 16)
  assert (width, height) == (40, 90) and pixels.shape == (16, 16, 3)
  with pytest.raises(decode.DecodeError):
    decode.thumbnail(b"no image", 16)
