"""Tests of saving and loading models, and of damaged, foreign and mismatching files."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import ov_models
from ov_models import files
from ov_models.testing import random_params

VIT = ov_models.ViTConfig(
  width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=8, position="learned"
)
TEXT = ov_models.TextConfig(width=12, depth=1, mlp_dim=20, num_heads=3, vocab_size=11, max_len=6)
WRITER = ov_models.DecoderConfig(
  width=12, depth=1, mlp_dim=20, num_heads=3, vocab_size=11, max_len=6
)
QUERIES = ov_models.QueryDecoderConfig(
  width=12, depth=1, mlp_dim=20, num_heads=3, vocab_size=11, num_queries=5
)
TOWERS = ov_models.VisionLanguageConfig(
  encoder=VIT, text=TEXT, decoder=QUERIES, embed_dim=8, bias_init=-10.0
)
CONFIGS = {
  "vit": VIT,
  "text": TEXT,
  "captioner": ov_models.VisionLanguageConfig(encoder=VIT, decoder=WRITER, keep_ratio=0.5),
  "two_towers": TOWERS,
  "no_text": dataclasses.replace(TOWERS, text=None, embed_dim=16, bias_init=None),
}


def saved(folder: pathlib.Path, config=TOWERS, **options):
  params = random_params(config)
  ov_models.save(folder, config, params, **options)
  return params


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_is_bit_exact(tmp_path, config):
  params = saved(tmp_path, config, extra={"license": "apache-2.0"})
  loaded, back = ov_models.load(tmp_path)
  assert loaded == config
  assert jax.tree.structure(back) == jax.tree.structure(params)
  chex.assert_trees_all_equal(back, params)
  ov_models.bind(loaded, back)
  assert ov_models.read_config(tmp_path)["license"] == "apache-2.0"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_the_rounded_parameters(tmp_path, dtype):
  params = saved(tmp_path, VIT, dtype=dtype)
  _, back = ov_models.load(tmp_path)
  rounded = jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), params)
  chex.assert_trees_all_equal(back, rounded)
  stored = safetensors.numpy.load_file(tmp_path / files.WEIGHTS_FILE)
  assert {str(tensor.dtype) for tensor in stored.values()} == {dtype}


def test_save_errors(tmp_path):
  params = random_params(VIT)
  with pytest.raises(ValueError, match="dtype='int8' is unknown"):
    ov_models.save(tmp_path, VIT, params, dtype="int8")
  large = params | {"cls": params["cls"].at[0].set(1e5)}
  with pytest.raises(ValueError, match=r"cls has values up to 1e\+05, .* float16"):
    ov_models.save(tmp_path, VIT, large, dtype="float16")
  broken = params | {"cls": params["cls"].at[0].set(jnp.nan)}
  with pytest.raises(ValueError, match="cannot save: cls contains NaN or Inf"):
    ov_models.save(tmp_path, VIT, broken)
  with pytest.raises(ValueError, match="missing cls"):
    ov_models.save(tmp_path, VIT, {k: v for k, v in params.items() if k != "cls"})
  assert not (tmp_path / files.WEIGHTS_FILE).exists()


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
    ov_models.load(tmp_path / "nowhere")
  saved(tmp_path)
  (tmp_path / files.WEIGHTS_FILE).unlink()
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
    ov_models.load(tmp_path)


def edit(folder: pathlib.Path, **changes):
  file = folder / files.CONFIG_FILE
  content = json.loads(file.read_text())
  content["model"] |= changes.pop("model", {})
  file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"library": "timm"}, "has library 'timm'"),
    ({"format": 99}, "format 99; this version reads openvision, up to format 2"),
    ({"model": {"kind": "Dict"}}, "kind='Dict' is unknown"),
    ({"model": {"colour": 1}}, "field of VisionLanguageConfig='colour' is unknown"),
    ({"model": {"embed_dim": 0}}, "embed_dim=0 must be a positive integer"),
    ({"model": {"embed_dim": 9}}, r"image_head/kernel is \(16, 8\), expected \(16, 9\)"),
  ],
)
def test_invalid_configs(tmp_path, changes, message):
  saved(tmp_path)
  edit(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    ov_models.load(tmp_path)


def test_damaged_files(tmp_path):
  saved(tmp_path)
  weights, config = tmp_path / files.WEIGHTS_FILE, tmp_path / files.CONFIG_FILE
  whole = weights.read_bytes()
  for content in (whole[:-100], (10**12).to_bytes(8, "little") + whole[8:], b"", b"\x80\x04."):
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
      ov_models.load(tmp_path)
  weights.write_bytes(whole)
  good = config.read_text()
  for text in ("{", "[]", "{}", good.replace('"kind"', '"sort"', 1)):
    config.write_text(text)
    with pytest.raises(ValueError, match=r"was not written by ov_models\.save"):
      ov_models.load(tmp_path)
  config.write_text(good + " " * (1 << 20))
  with pytest.raises(ValueError, match="a configuration has at most"):
    ov_models.load(tmp_path)


def test_load_rejects_nan(tmp_path):
  saved(tmp_path, VIT)
  tensors = dict(safetensors.numpy.load_file(tmp_path / files.WEIGHTS_FILE))
  tensors["norm/scale"] = np.full(16, np.inf, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / files.WEIGHTS_FILE)
  with pytest.raises(ValueError, match="norm/scale contains NaN or Inf"):
    ov_models.load(tmp_path)


def test_last_hidden_state_equals_the_tokens():
  params = random_params(TOWERS)
  model = ov_models.bind(TOWERS, params)
  images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  states = model.encoder.hidden_states(images)
  assert states.shape == (VIT.depth + 1, 2, 1 + 4, 16)
  np.testing.assert_array_equal(states[-1][:, 1:], model.encoder(images).tokens)
  ids = jnp.array([[1, 5, 2, 0, 0, 4], [1, 5, 7, 8, 2, 4]])
  states = model.text.hidden_states(ids)
  assert states.shape == (TEXT.depth + 1, 2, 6, 12)
  np.testing.assert_array_equal(states[-1], model.text(ids).tokens)
  assert not np.array_equal(states[0], states[-1])
