"""Tests that StableHLO runs without our code and equals our model, for all batch sizes."""

import dataclasses
import json
import sys

import chex
import jax
import numpy as np
import pytest

from ov_convert import stablehlo
from ov_convert.release import portable
from ov_convert.testing.complete_models import (
  LENGTH,
  largest_difference,
  our_arrays,
  random_inputs,
  run,
  small_release,
)
import ov_models
from ov_models import DecoderConfig, TextConfig, VisionLanguageConfig, ViTConfig

replace = dataclasses.replace
VIT = ViTConfig(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=18)
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=40, max_len=LENGTH)
WRITER = DecoderConfig(width=20, depth=2, mlp_dim=28, num_heads=2, vocab_size=40, max_len=9)
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=WRITER, embed_dim=10, bias_init=-3.0)
# A config as of a run on GPUs: none of these options may reach what is exported.
GPU = {"attention": "cudnn", "dtype": "bfloat16", "remat": "full", "scan": False}
CAPTIONER = VisionLanguageConfig(
  encoder=replace(VIT, pool="map", **GPU),
  decoder=replace(WRITER, mask="causal", position="none", **GPU),
  keep_ratio=0.4,
  eval_keep="fixed",
)
MODELS = {
  "two towers": (TOWERS, "float32", 14),
  "captioner": (CAPTIONER, "bfloat16", 26),
  "text": (replace(TEXT, pool="mean"), "float16"),
  "image": (VIT, "float32"),
}
# The same arithmetic, compiled in another way: a few roundings of float32. Measured: 2.1e-7 of the
# largest entry.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=MODELS, ids=MODELS)
def case(request, tmp_path_factory):
  release = small_release(*MODELS[request.param])
  folder = tmp_path_factory.mktemp("stablehlo") / "model"
  stablehlo.write(folder, release)
  return release, folder


def test_outputs_equal_ov_models(case, tmp_path):
  release, folder = case
  for batch in (1, 3, 5) if release.config == TOWERS else (3,):  # every run compiles it all
    compare(release, folder, batch, tmp_path)


def compare(release, folder, batch, tmp_path):
  inputs = random_inputs(release, batch)
  theirs = run("run_stablehlo.py", folder, inputs, tmp_path, python=sys.executable)
  ours = our_arrays(replace(release, config=portable(release.config)), inputs)
  expected = {name for name in ours if "/block" not in name and name != "text/tokens"}
  assert theirs.arrays.keys() == expected
  for name in expected:
    if name == "caption/ids":
      np.testing.assert_array_equal(theirs.arrays[name], ours[name])
    else:
      difference = largest_difference(ours[name], theirs.arrays[name])
      assert difference < TOLERANCE, (name, difference)


def test_the_json_file_describes_the_functions(case):
  release, folder = case
  about = json.loads((folder / "export.json").read_text("utf-8"))
  assert about["jax"] == jax.__version__ and about["calling_convention"] >= 10
  for name, function in about["functions"].items():
    content = (folder / f"{name}.stablehlo").read_bytes()
    exported = jax.export.deserialize(bytearray(content))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert function["input"]["shape"][0] == "b"
    assert [str(side) for side in exported.in_avals[-1].shape] == [
      str(side) for side in function["input"]["shape"]
    ]
    text = exported.mlir_module()
    assert "bf16" not in text or release.dtype == "bfloat16"
    assert "xla_gpu" not in text and "cudnn" not in text
  assert sorted(p.name for p in folder.glob("*.stablehlo")) == sorted(
    f"{name}.stablehlo" for name in about["functions"]
  )


def test_parameters_stay_out(tmp_path):
  """Twice the width, four times the parameters: the function hardly grows."""
  sizes = []
  for width in (32, 64):
    config = replace(VIT, width=width, mlp_dim=4 * width)
    stablehlo.write(tmp_path / str(width), small_release(config))
    sizes.append((tmp_path / str(width) / "image.stablehlo").stat().st_size)
  # The table of positions, [T, D] float32, is computed and part of it.
  assert sizes[1] - sizes[0] < 4 * 16 * 32 + 2048


def test_the_folder_loads_in_ov_models(case):
  release, folder = case
  config, params = ov_models.load(folder)
  assert config == release.config
  chex.assert_trees_all_equal(params, release.params)


def test_files_contain_no_local_paths(tmp_path):
  stablehlo.write(tmp_path / "model", small_release(*MODELS["image"]))
  for file in (tmp_path / "model").iterdir():
    content = file.read_bytes()
    for place in (b"site-packages", b".py", str(tmp_path).encode(), b"/home/", b"/root/"):
      assert place not in content, (file.name, place)


def test_inconsistent_parts_are_rejected(tmp_path):
  release = small_release(VIT)
  preprocess = replace(release.preprocess, image_size=32)
  with pytest.raises(ValueError, match="image_size=32"):
    stablehlo.write(tmp_path / "model", replace(release, preprocess=preprocess))
  assert not (tmp_path / "model").exists()
