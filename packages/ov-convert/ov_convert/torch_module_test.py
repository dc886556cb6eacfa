"""Tests that the PyTorch module equals our model, including captions."""

import dataclasses
import json
import pathlib
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from ov_convert import client_env, name_map, torch_module
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

BATCH = 3
VIT = ViTConfig(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=18)
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=40, max_len=LENGTH)
WRITER = DecoderConfig(width=20, depth=2, mlp_dim=28, num_heads=2, vocab_size=40, max_len=9)
QUERIES = ov_models.QueryDecoderConfig(
  width=20, depth=2, mlp_dim=28, num_heads=2, vocab_size=40, num_queries=5
)
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=None, embed_dim=10)
replace = dataclasses.replace
# They cover every position, pool, mask, padding and decoder. Each has the dtype of the file, and an
# end token that occurs in some caption before its last column.
MODELS = {
  "two towers, prefix decoder": (
    replace(TOWERS, decoder=replace(WRITER, parallel=True), bias_init=-3.0, parallel_ratio=0.5),
    "float32",
    14,
  ),
  "two towers, queries": (
    replace(
      TOWERS,
      encoder=replace(VIT, position="learned", pool="tok"),
      text=replace(TEXT, pool="map"),
      decoder=QUERIES,
    ),
    "float32",
  ),
  "two towers, queries after cls": (replace(TOWERS, decoder=QUERIES), "float16"),
  "clip": (
    replace(TOWERS, text=replace(TEXT, pool="argmax", mask="causal", padding="attend")),
    "float32",
  ),
  "no text": (
    replace(TOWERS, text=None, embed_dim=16, decoder=replace(WRITER, position="sincos")),
    "float32",
    28,
  ),
  "captioner, causal": (
    VisionLanguageConfig(
      encoder=replace(VIT, pool="map"),
      decoder=replace(WRITER, mask="causal", position="none"),
      keep_ratio=0.4,
      eval_keep="fixed",
    ),
    "bfloat16",
    26,
  ),
  "text, mean": (replace(TEXT, pool="mean"), "float32"),
  "text, first": (replace(TEXT, pool="first", padding="attend"), "float32"),
  "image": (VIT, "float32"),
}
# float32 sums of at most 100 terms in another order; measured: 4.7e-7 of the largest entry.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=MODELS, ids=MODELS)
def case(request, tmp_path_factory):
  """A release, its folder, its inputs, and the outputs of the module in the folder."""
  release = small_release(*MODELS[request.param])
  scratch = tmp_path_factory.mktemp("torch")
  torch_module.write(scratch / "model", release)
  inputs = random_inputs(release, BATCH)
  theirs = run("run_torch.py", scratch / "model", inputs, scratch)
  return release, scratch / "model", inputs, theirs


def test_outputs_equal_ov_models(case):
  release, _, inputs, theirs = case
  ours = our_arrays(release, inputs)
  assert ours.keys() == theirs.arrays.keys()
  for name, array in ours.items():
    if name == "caption/ids":
      np.testing.assert_array_equal(theirs.arrays[name], array)
      lengths = {tuple(row).index(end) for row in array if (end := release.words.eos_id) in row}
      assert (
        min(lengths) + 1 < array.shape[1] and len(np.unique(array)) > 3
      )  # captions of different lengths, with several tokens
    else:
      difference = largest_difference(array, theirs.arrays[name])
      assert difference < TOLERANCE, (name, difference)


def test_settings_are_recorded(case):
  _, _, _, theirs = case
  norms = [value for name, value in theirs.facts.items() if name.endswith("norm eps")]
  assert norms and set(norms) == {1e-6}
  for tower, gelu in (("image/", "gelu"), ("text/", "gelu tanh"), ("decoder/", "gelu tanh")):
    told = {v for k, v in theirs.facts.items() if k.startswith(tower) and k.endswith("activation")}
    assert told <= {gelu}


def test_round_trip(case):
  release, folder, _, _ = case
  back = torch_module.read(folder)
  assert back.config == release.config
  assert back.preprocess == release.preprocess and back.words == release.words
  want, have = name_map.flatten(release.params), name_map.flatten(back.params)
  assert want.keys() == have.keys()
  for name, tensor in want.items():
    np.testing.assert_array_equal(have[name], tensor)


@pytest.fixture
def written(tmp_path):
  release = small_release(VIT)
  torch_module.write(tmp_path / "model", release)
  return release, tmp_path / "model", random_inputs(release, BATCH)


def rewrite(folder, change):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


def test_a_transposed_kernel_is_detected(written, tmp_path):
  release, folder, inputs = written

  def change(tensors):
    name = "blocks/attn/query/kernel"
    tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

  rewrite(folder, change)
  theirs = run("run_torch.py", folder, inputs, tmp_path)
  ours = our_arrays(release, inputs)
  distance = {n: largest_difference(ours[n], theirs.arrays[n]) for n in ours}
  assert distance["image/block_00"] < TOLERANCE
  assert distance["image/block_01"] > 100 * TOLERANCE


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"rotary": "pe"},
    {"rotary": "mrope", "position": "none"},
    {"rotary": "dinov3", "position": "none", "registers": 2},
  ],
)
def test_images_of_another_size(options, tmp_path):
  release, folder = small_release(replace(VIT, **options)), tmp_path / "model"
  torch_module.write(folder, release)
  pixels = np.random.default_rng(1).normal(size=(2, 26, 31, 3)).astype(np.float32)
  theirs = run("run_torch.py", folder, {"pixels": pixels}, tmp_path)
  for name, array in our_arrays(release, {"pixels": pixels}).items():
    difference = largest_difference(array, theirs.arrays[name])
    assert difference < TOLERANCE, (name, difference)


def test_learned_positions_refuse_another_size(tmp_path):
  release = small_release(replace(VIT, position="learned"))
  torch_module.write(tmp_path / "model", release)
  pixels = np.zeros((1, 26, 26, 3), np.float32)
  with pytest.raises(client_env.ClientError, match=r"\(6, 6\) patches.*of \(4, 4\)"):
    run("run_torch.py", tmp_path / "model", {"pixels": pixels}, tmp_path)


def test_captions_end_with_the_learned_positions(tmp_path):
  """A caption as long as the positions is in `test_outputs_equal_ov_models`."""
  release = small_release(MODELS["two towers, prefix decoder"][0])
  torch_module.write(tmp_path / "model", release)
  asks = (
    "import sys, torch; sys.path.insert(0, sys.argv[1]); from openvision_torch import OpenVision; "
    "OpenVision.from_folder(sys.argv[1]).generate(torch.zeros(1, 3, 18, 18), 10, 1, 2, 0)"
  )
  command = [client_env.find_python(), "-c", asks, tmp_path / "model"]
  said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
  assert "ValueError: max_len=10; expected at most 9 (learned positions)." in said


def test_tensors_that_do_not_fit_are_named(written, tmp_path):
  _, folder, inputs = written

  def change(tensors):
    tensors.pop("norm/scale")
    tensors.update(extra=np.ones(3, np.float32), cls=np.ones(3, np.float32))

  rewrite(folder, change)
  with pytest.raises(client_env.ClientError) as error:
    run("run_torch.py", folder, inputs, tmp_path)
  for name in ("encoder.norm.weight", "encoder.extra", "encoder.cls"):  # missing, unexpected, shape
    assert name in str(error.value)


def test_the_module_is_short():
  lines = (client_env.SCRIPTS / torch_module.MODULE_FILE).read_text("utf-8").splitlines()
  assert len(lines) <= 450


def test_folders_of_earlier_versions_without_options(tmp_path):
  release = small_release(MODELS["two towers, queries after cls"][0])
  torch_module.write(tmp_path / "model", release)
  file = tmp_path / "model/config.json"
  content = json.loads(file.read_text("utf-8"))
  model = content["model"]
  options = {name.rpartition(".")[2] for name in torch_module._SUPPORTED} - {"pool", "position"}
  for part in (model, *(model[name] for name in ("encoder", "text", "decoder"))):
    for name in options & part.keys():
      del part[name]
  file.write_text(json.dumps(content), "utf-8")
  inputs = random_inputs(release, BATCH)
  theirs = run("run_torch.py", tmp_path / "model", inputs, tmp_path)
  for name, array in our_arrays(release, inputs).items():
    difference = largest_difference(array, theirs.arrays[name])
    assert difference < TOLERANCE, (name, difference)


def test_options_that_the_module_lacks_are_refused_by_name(tmp_path, monkeypatch):
  release = small_release(replace(VIT, layer_scale=1.0, pool="mean"))
  monkeypatch.setattr(torch_module, "_SUPPORTED", frozenset({"encoder.pool"}))
  with pytest.raises(ValueError) as caught:
    torch_module.write(tmp_path / "model", release)
  assert "does not support encoder.layer_scale=1.0; export as stablehlo" in str(caught.value)
  assert "\n" not in str(caught.value) and "pool" not in str(caught.value)
  assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"preprocess": {"image_size": 32}}, "image_size=32"),
    ({"words": {"eos_id": 40}}, "eos_id=40"),
    ({"words": {"length": 6}}, "words.length=6"),
    ({"words": {"pad_id": 3}}, "words.pad_id=3"),
  ],
)
def test_inconsistent_parts_are_rejected(tmp_path, change, message):
  release = small_release(TOWERS)
  changed = {name: replace(getattr(release, name), **value) for name, value in change.items()}
  with pytest.raises(ValueError, match=message):
    torch_module.write(tmp_path / "model", replace(release, **changed))
  assert not (tmp_path / "model").exists()


def test_a_damaged_config_is_refused(written):
  _, folder, _ = written
  file = pathlib.Path(folder) / "config.json"
  content = json.loads(file.read_text("utf-8"))
  del content["preprocess"]["mean"]
  file.write_text(json.dumps(content), "utf-8")
  with pytest.raises(ValueError, match="mean"):
    torch_module.read(folder)
