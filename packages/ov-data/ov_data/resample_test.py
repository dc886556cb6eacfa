from concurrent import futures

import numpy as np
from PIL import Image
import pytest

from ov_data import resample

BOXES = {
  "whole": (0, 0, 90, 70),
  "inside": (13, 8, 61, 66),
  "cuts pixels": (12.5, 3.25, 70.75, 69.5),
  "at the far corner": (33, 20, 90, 70),
  "one pixel": (5, 7, 6, 8),
}


@pytest.fixture
def pixels():
  return np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


def _with_pillow(pixels, box, size):
  image = Image.fromarray(np.ascontiguousarray(pixels))
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


def _in_float(pixels, box, size):
  channels = (Image.fromarray(pixels[..., number].astype(np.float32)) for number in range(3))
  resized = [c.resize((size, size), Image.Resampling.BILINEAR, box) for c in channels]
  return np.stack([np.asarray(channel) for channel in resized], -1)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [1, 5, 24, 59, 100])
def test_is_the_triangle_filter_of_pillow(pixels, box, size):
  for source in (pixels, pixels[::-1], pixels[::-1, ::-1]):
    difference = resample.triangle(source, BOXES[box], size) - _in_float(source, BOXES[box], size)
    # Each of the two passes rounds by at most 0.5; coefficients of 15 bits add less than 0.01 of
    # 255. Rounding is unbiased except for ties; truncation would shift the mean by 1.
    assert np.abs(difference).max() < 1.02 and np.abs(difference).mean() < 0.5
    if size > 20 and box != "one pixel":
      assert abs(difference.mean()) < 0.25


def test_every_value_of_a_flat_image_stays(pixels):
  for value in (0, 1, 127, 254, 255):
    pixels[:] = value
    assert (resample.triangle(pixels, (3.3, 4.7, 80.1, 66.6), 31) == value).all()


def test_boxes_that_end_at_the_border_by_a_rounding_error(pixels):
  # Products such as 7 x (90 / 7) exceed 90 by an ulp for some sides.
  for side in range(50, 400):
    across, down = 90 / side, 70 / side
    box = (side * across / 3, 0.1 * down, side * across, side * down)
    assert resample.triangle(pixels, box, 4).shape == (4, 4, 3)
    box = (0, 0, np.nextafter(90, 100), np.nextafter(70, 100))
    assert resample.triangle(pixels, box, 4).shape == (4, 4, 3)


@pytest.mark.parametrize("period", [2.5, 3.3, 5])
def test_stripes_finer_than_the_new_pixels_become_gray(period):
  # At a factor of 6 the triangle is 12 pixels wide. At these periods its spectrum, sinc^2 of
  # 6 / period, is below 0.025, which leaves at most 3.2 of an amplitude of 127, plus rounding.
  wave = 127.5 + 127.5 * np.cos(2 * np.pi * np.arange(240) / period)
  stripes = np.repeat(np.tile(wave, (240, 1))[..., None], 3, -1).astype(np.uint8)
  for pixels in (stripes, stripes.swapaxes(0, 1)):
    small = resample.triangle(pixels, (12, 12, 228, 228), 36).astype(float)
    assert np.abs(small - 127).max() < 4.5
    assert np.abs(pixels[12:228:6, 12:228:6] - 127.0).max() > 100  # without antialiasing


def test_threads_give_the_same(pixels):
  expected = resample.triangle(pixels, BOXES["cuts pixels"], 24)
  with futures.ThreadPoolExecutor(4) as pool:
    for got in pool.map(lambda _: resample.triangle(pixels, BOXES["cuts pixels"], 24), range(64)):
      np.testing.assert_array_equal(got, expected)


def test_without_the_fast_library_pillow_resizes(pixels, monkeypatch):
  monkeypatch.setattr(resample, "cykooz_resizer", None)
  for source in (pixels, pixels[::-1]):
    got = resample.triangle(source, BOXES["cuts pixels"], 24)
    np.testing.assert_array_equal(got, _with_pillow(source, BOXES["cuts pixels"], 24))


def test_results_do_not_depend_on_the_processor(pixels, monkeypatch):
  if resample.cykooz_resizer is None:
    pytest.skip("SKIPPED: cykooz-resizer has no wheel for this machine")
  expected = resample.triangle(pixels, BOXES["cuts pixels"], 24)
  plain = resample.cykooz_resizer.Resizer()
  plain.cpu_extensions = resample.cykooz_resizer.CpuExtensions.none
  monkeypatch.setattr(resample._thread, "resizer", plain)
  np.testing.assert_array_equal(resample.triangle(pixels, BOXES["cuts pixels"], 24), expected)
