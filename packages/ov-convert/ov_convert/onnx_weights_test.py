"""Tests of ONNX graphs with smaller weights: accuracy, size, and detection of bad ones."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from ov_convert import client_env, onnx_export, onnx_weights
from ov_convert.testing.complete_models import LENGTH, random_inputs, run, small_release
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig

VIT = ViTConfig(width=64, depth=2, mlp_dim=128, num_heads=2, patch_size=4, image_size=16)
TEXT = TextConfig(width=64, depth=2, mlp_dim=128, num_heads=2, vocab_size=400, max_len=LENGTH)
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, embed_dim=32)
COUNT = 24
# Smallest cosines and sizes of these random models. Expected errors of a weight: float16 2^-12
# relative, int8 1/510 and int4 1/30 of the range of its group. Measured: 1 - 1e-7, 0.9995, 0.985.
BARS = {"float16": 0.99999, "int8": 0.998, "int4": 0.96}


def release_of(config, *, outliers: bool = False):
  """Return a model; `outliers` adds huge weights that multiply zeros only."""
  release = small_release(config)
  for tower in ("encoder", "text") if outliers else ():
    blocks = release.params[tower]["blocks"]
    for norm, kernels in (
      (blocks["norm1"], [blocks["attn"][name] for name in ("query", "key", "value")]),
      (blocks["norm2"], [blocks["mlp"]["up"]]),
    ):
      for channel in range(0, 64, 16):  # in every block of 32 weights
        norm["scale"][:, channel] = norm["bias"][:, channel] = 0
        for kernel in kernels:
          kernel["kernel"][:, channel] = 1000
  return release


def written(release, folder: pathlib.Path) -> pathlib.Path:
  onnx_export.write(folder / "model", release)
  return folder / "model"


def probe_of(release, folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  (folder / "texts.json").write_text("[]")
  np.savez(folder / "probe.npz", **random_inputs(release, COUNT))
  return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  scratch = tmp_path_factory.mktemp("weights")
  release = release_of(TOWERS)
  return release, written(release, scratch), probe_of(release, scratch / "probe")


@pytest.mark.parametrize("weights", BARS)
def test_each_type_is_accurate_and_smaller(case, weights, tmp_path):
  release, folder, probe = case
  before = run("run_onnx.py", folder, random_inputs(release, COUNT), tmp_path)
  copy = shutil.copytree(folder, tmp_path / "copy")
  found = onnx_weights.convert(copy, weights, probe, min_cosine=BARS[weights])
  assert found.ok, found
  assert found.count == {"image": COUNT, "text": COUNT}
  assert found.overlap is not None and found.overlap > 0.5
  assert found.zero_shot_agreement is not None and found.zero_shot_agreement > 0.5
  assert all(speed > 0 for speed in found.speed.values())
  names = {file.name for file in folder.iterdir()}
  assert {file.name for file in copy.iterdir()} == names

  # The folder has the converted graphs, and works after it was moved.
  (tmp_path / "scratch").mkdir()
  moved = copy.rename(tmp_path / "moved")
  after = run("run_onnx.py", moved, random_inputs(release, COUNT), tmp_path / "scratch")
  for tower in ("image", "text"):
    cosine = (after.arrays[f"{tower}/embedding"] * before.arrays[f"{tower}/embedding"]).sum(axis=1)
    # float32 dot products of 32 terms; int8 activations have one scale for all rows of a batch, and
    # the comparison uses batches of 8.
    tolerance = 5e-4 if weights == "int8" else 1e-5
    assert float(cosine.min()) == pytest.approx(found.min_cosine[tower], abs=tolerance)
    assert not np.array_equal(
      after.arrays[f"{tower}/embedding"], before.arrays[f"{tower}/embedding"]
    )
  assert after.facts == before.facts  # same inputs, dynamic batch size
  data = [sum(f.stat().st_size for f in d.glob("*.onnx.data")) for d in (folder, moved)]
  # The tables of positions and words, 40% of the weights here, are float16 in all.
  assert data[1] / data[0] < {"float16": 0.52, "int8": 0.40, "int4": 0.32}[weights]
  for file in moved.iterdir():
    content = file.read_bytes()
    assert b"site-packages" not in content and str(tmp_path).encode() not in content


def test_an_image_tower_alone_is_compared_by_pooled_vectors(tmp_path):
  release = small_release(VIT)
  folder = written(release, tmp_path)
  found = onnx_weights.convert(folder, "int8", probe_of(release, tmp_path / "probe"))
  assert found.count == {"image": COUNT} and found.ok
  assert not list(folder.glob("text*"))


def test_outliers_are_detected(tmp_path):
  # They multiply channels that are always 0. In float32 and float16 this changes nothing, but the
  # scale of their group rounds all other weights to 0.
  release = release_of(TOWERS, outliers=True)
  folder = written(release, tmp_path)
  probe = probe_of(release, tmp_path / "probe")
  for weights in ("int8", "int4"):
    copy = shutil.copytree(folder, tmp_path / weights)
    found = onnx_weights.convert(copy, weights, probe)
    assert not found.ok and max(found.min_cosine.values()) < 0.9, found
  found = onnx_weights.convert(folder, "float16", probe)
  assert min(found.min_cosine.values()) > BARS["float16"]


def test_values_beyond_float16_stay_float32(tmp_path):
  release = small_release(VIT)
  kernel = release.params["patch_embed"]["kernel"]
  kernel[0, 0, 0, 0] = 1e5
  folder = written(release, tmp_path)
  found = onnx_weights.convert(folder, "float16", probe_of(release, tmp_path / "probe"))
  assert found.min_cosine["image"] > BARS["float16"]
  program = (
    "import onnx, sys; graph = onnx.load(sys.argv[1], load_external_data=False).graph; "
    "print([t.data_type for t in graph.initializer if 'patch_embed.weight' in t.name])"
  )
  command = [str(client_env.find_python()), "-c", program, str(folder / "image.onnx")]
  assert subprocess.run(command, capture_output=True, check=True).stdout.strip() == b"[1]"


def test_mistakes_are_errors_before_anything_is_read(tmp_path):
  for weights, bar, message in (
    ("int5", 0.9, "weights='int5'; expected one of float32, float16, int8, int4"),
    ("int8", 1.5, "min_cosine=1.5; expected a cosine"),
    ("float32", 0.9, "nothing is to be converted"),
  ):
    with pytest.raises(ValueError, match=message):
      onnx_weights.convert(tmp_path / "none", weights, tmp_path, min_cosine=bar)


def test_bounds_of_the_agreement_are_checked_before_the_conversion(tmp_path):
  with pytest.raises(ValueError, match=r"min_agreement=1\.5; expected a fraction"):
    onnx_weights.convert(tmp_path, "int8", tmp_path, min_agreement=1.5)
  (tmp_path / "image.onnx").touch()
  with pytest.raises(ValueError, match="expected a model with an image and a text tower"):
    onnx_weights.convert(tmp_path, "int8", tmp_path, min_agreement=0.5)


def test_a_failed_conversion_keeps_the_graphs(case, tmp_path):
  _, folder, _ = case
  copy = shutil.copytree(folder, tmp_path / "copy")
  np.savez(tmp_path / "probe.npz", pixels=np.zeros((1, 3, 3, 3), np.float32))
  (tmp_path / "texts.json").write_text("[]")
  before = {file.name: file.read_bytes() for file in copy.iterdir()}
  with pytest.raises(client_env.ClientError, match=r"compare_onnx\.py failed"):
    onnx_weights.convert(copy, "int8", tmp_path)
  assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
