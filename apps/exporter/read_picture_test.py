"""Tests that `read_picture` of model cards returns our pixels for all kinds of images."""

import random

import numpy as np
from PIL import Image
import pytest

from apps.exporter import snippets, testing_pictures
from apps.exporter.formats.table import EXPORTS
from ov_convert import testing
from ov_convert.release import Preprocess
from ov_data import decode, image_header
import ov_models

KINDS = testing_pictures.every_kind()
FITS = ("center", "squash")
SIZE = 32
# Mean and maximum for JPEGs: training decodes with the fast DCT, which Pillow does not support.
JPEG_LEVELS = 2.0, 8


@pytest.fixture(scope="module")
def readers():
  """Return `read_picture` by (format, fit), extracted from the programs."""
  config = ov_models.ViTConfig.from_name("Ti/16", image_size=SIZE)
  found = {}
  for fit in FITS:
    release = testing.release(config, preprocess=Preprocess(SIZE, fit))
    for kind in EXPORTS:
      for number, program in enumerate(snippets.snippets(kind, release)):
        if program.library != "safetensors":  # which calls ov_data itself
          scope = {"np": np, "Image": Image}
          exec(_function(program.code), scope)
          found[kind, fit, number] = scope["read_picture"]
  return found


def _function(code):
  """Return the source of `orientation` and `read_picture`."""
  start = code.index("def orientation(")
  return code[start : code.index("\n\n", code.index("def read_picture("))]


def test_all_formats_have_the_image_reader(readers):
  assert {(kind, fit) for kind, fit, _ in readers} == {
    (kind, fit) for kind in EXPORTS for fit in FITS
  }


@pytest.mark.parametrize("name", KINDS)
def test_pixels_equal_ov_data(readers, name, tmp_path):
  file = tmp_path / "picture"
  file.write_bytes(KINDS[name])
  for (kind, fit, _), read in readers.items():
    ours = decode.whole(KINDS[name], SIZE, fit).astype(np.int32)
    theirs = np.asarray(read(file)).astype(np.int32)
    assert theirs.shape == (SIZE, SIZE, 3)
    same_decoder = not name.startswith("jpeg") or name == "jpeg cmyk"
    mean, largest = (0, 0) if same_decoder else JPEG_LEVELS
    difference = np.abs(ours - theirs)
    assert difference.mean() <= mean and difference.max() <= largest, (kind, fit)
    cosine = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.9999


def test_orientations_of_damaged_exif_equal_ov_data():
  release = testing.release(ov_models.ViTConfig.from_name("Ti/16", image_size=SIZE))
  scope = {"np": np, "Image": Image}
  exec(_function(snippets.snippets("onnx", release)[0].code), scope)
  exif = Image.Exif()
  exif[0x010E], exif[0x0112] = "a description", 6
  whole, rng = exif.tobytes(), random.Random(0)
  turned = 0
  for _ in range(2000):
    block = bytearray(whole)
    for _ in range(rng.randint(0, 3)):
      block[rng.randrange(len(block))] = rng.randrange(256)
    block = bytes(block[: rng.randint(0, len(block))])
    ours, theirs = image_header.orientation(block), scope["orientation"](block)
    assert ours == theirs if theirs in range(2, 9) else ours == 1
    turned += ours == 6
  assert 100 < turned < 1900


def test_kinds_differ_where_a_plain_conversion_would_be_wrong(tmp_path):
  """Tests that the test above fails for a program that only converts to RGB."""
  wrong = []
  for name, data in KINDS.items():
    file = tmp_path / "picture"
    file.write_bytes(data)
    plain = np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE)), np.int32)
    if np.abs(plain - decode.whole(data, SIZE, "squash")).max() > 60:
      wrong.append(name)
  assert {"png rgba", "png 16-bit gray", "png palette, transparent", "webp, turned"} <= {*wrong}
  assert {f"jpeg orientation {turned}" for turned in range(2, 9)} <= {*wrong}
