"""Tests that ONNX graphs equal our model, for all batch sizes, in a moved folder."""

import dataclasses
import json
import pathlib
import subprocess

import numpy as np
import pytest

from ov_convert import client_env, onnx_export
from ov_convert.testing.complete_models import (
  LENGTH,
  largest_difference,
  our_arrays,
  random_inputs,
  run,
  small_release,
)
from ov_models import DecoderConfig, TextConfig, VisionLanguageConfig, ViTConfig

VIT = ViTConfig(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=18)
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=40, max_len=LENGTH)
WRITER = DecoderConfig(width=20, depth=1, mlp_dim=28, num_heads=2, vocab_size=40, max_len=9)
# The graphs differ in masked padding, attention masks, causal masks and indexing.
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=WRITER, embed_dim=10, bias_init=-3.0)
CAUSAL = dataclasses.replace(
  TOWERS,
  decoder=None,
  encoder=dataclasses.replace(VIT, position="learned", pool="map"),
  text=dataclasses.replace(TEXT, pool="argmax", mask="causal"),
)
# float32 sums of at most 100 terms in another order; measured: 1.0e-6 of the largest entry.
# Rounding of float32 in two implementations: at most 1.2e-5 was measured, with jax 0.9.1 and
# onnxruntime 1.19.
TOLERANCE = 3e-5


@pytest.fixture(scope="module", params=[TOWERS, CAUSAL, VIT], ids=["towers", "causal", "image"])
def case(request, tmp_path_factory):
  """A release, and its folder, moved after it was written."""
  release = small_release(request.param)
  scratch = tmp_path_factory.mktemp("onnx")
  onnx_export.write(scratch / "written", release)
  return release, (scratch / "written").rename(scratch / "moved")


@pytest.mark.parametrize("batch", [1, 2, 5])  # traced with 2
def test_outputs_equal_ov_models(case, batch, tmp_path):
  release, folder = case
  inputs = random_inputs(release, batch)
  theirs = run("run_onnx.py", folder, inputs, tmp_path)
  ours = our_arrays(release, inputs)
  both = release.text is not None
  names = {"image/pooled", "image/tokens"}
  names |= {"image/embedding", "text/embedding", "logits"} if both else set()
  assert theirs.arrays.keys() == names
  for name in names:
    difference = largest_difference(ours[name], theirs.arrays[name])
    assert difference < TOLERANCE, (name, difference)
  assert theirs.facts["image.onnx pixel_values"] == ["tensor(float)", "batch", 3, 18, 18]


def test_the_folder_is_complete_and_has_no_local_paths(case):
  release, folder = case
  names = {file.name for file in folder.iterdir()}
  expected = {"image.onnx", "image.onnx.data", "preprocessor.json"}
  if release.text is not None:
    expected |= {"text.onnx", "text.onnx.data", "tokenizer.json"}
  assert names == expected
  for file in folder.glob("*.onnx"):
    content = file.read_bytes()
    for secret in (b"site-packages", str(pathlib.Path.home()).encode(), b"openvision_torch.py"):
      assert secret not in content
    assert len(content) < 1 << 20  # weights are in a separate file


def test_preprocessing_and_scale_are_stored(case):
  release, folder = case
  content = json.loads((folder / "preprocessor.json").read_text("utf-8"))
  assert content["image_size"] == 18 and content["fit"] == "center"
  assert content["mean"] == list(release.preprocess.mean)
  if release.text is not None:
    np.testing.assert_allclose(content["logit_scale"], np.exp(release.params["log_scale"]), 1e-6)
    np.testing.assert_allclose(content["logit_bias"], release.params["bias"], 1e-6)
    assert content["words"]["length"] == LENGTH


def test_a_text_tower_alone(tmp_path):
  release = small_release(dataclasses.replace(TEXT, pool="map"))
  onnx_export.write(tmp_path / "model", release)
  inputs = random_inputs(release, 3)
  theirs = run("run_onnx.py", tmp_path / "model", inputs, tmp_path)
  ours = our_arrays(release, inputs)["text/pooled"]
  assert theirs.arrays.keys() == {"text/pooled"}
  assert largest_difference(ours, theirs.arrays["text/pooled"]) < TOLERANCE


def test_other_dtypes_are_refused_with_everything_else(tmp_path):
  release = small_release(VIT, "bfloat16")
  preprocess = dataclasses.replace(release.preprocess, image_size=32)
  with pytest.raises(ValueError, match="bfloat16(.|\n)*image_size=32"):
    onnx_export.write(tmp_path / "model", dataclasses.replace(release, preprocess=preprocess))
  assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_graphs_have_the_requested_opset(tmp_path, opset):
  release = small_release(VIT)
  folder = tmp_path / "model"
  onnx_export.write(folder, release, opset=opset)
  program = (
    "import onnx, sys; graph = onnx.load(sys.argv[1], load_external_data=False); "
    "print({o.domain: o.version for o in graph.opset_import}[''])"
  )
  command = [str(client_env.find_python()), "-c", program, str(folder / "image.onnx")]
  assert int(subprocess.run(command, capture_output=True, check=True).stdout) == opset
  assert json.loads((folder / "preprocessor.json").read_text("utf-8"))["opset"] == opset
  inputs = random_inputs(release, 3)
  theirs = run("run_onnx.py", folder, inputs, tmp_path)
  ours = our_arrays(release, inputs)["image/pooled"]
  assert largest_difference(ours, theirs.arrays["image/pooled"]) < TOLERANCE


@pytest.mark.parametrize("opset", [17, 24, -1, 10**9])
def test_other_opsets_are_refused_before_anything_is_written(tmp_path, opset):
  with pytest.raises(ValueError, match=f"onnx_opset={opset}; expected 18 to 23"):
    onnx_export.write(tmp_path / "model", small_release(VIT), opset=opset)
  assert not (tmp_path / "model").exists()
