"""Tests of the timm format: names, shapes, round trips, and outputs of the library."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import parity, testing, timm_vit
from ov_convert.release import Preprocess
import ov_models
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig
from ov_models.testing import random_params

VIT = ViTConfig(width=16, depth=3, mlp_dim=41, num_heads=2, patch_size=4, image_size=14)
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=20, max_len=9)
DECODER = ov_models.DecoderConfig(
  width=8, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_len=9
)
LEARNED = dataclasses.replace(VIT, position="learned", pool="tok")
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=DECODER, embed_dim=10, bias_init=-3.0)
CONFIGS = {
  "gap": VIT,
  "tok, learned": LEARNED,
  "map": dataclasses.replace(VIT, pool="map"),
  "captioner": VisionLanguageConfig(encoder=LEARNED, decoder=DECODER),
  "without text": VisionLanguageConfig(encoder=VIT, text=None, decoder=DECODER, embed_dim=16),
  "towers": TOWERS,
}


def encoder_of(config, params):
  alone = isinstance(config, ViTConfig)
  return (config, params) if alone else (config.encoder, params["encoder"])


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_is_exact(config):
  params = random_params(config)
  flat = timm_vit.name_map(config).to_theirs(params, config)
  encoder, image = encoder_of(config, params)
  if "head.weight" in flat:
    np.testing.assert_array_equal(flat.pop("head.weight"), params["image_head"]["kernel"].T)
    assert not flat.pop("head.bias").any()
  assert_same(timm_vit.name_map(encoder).to_ours(flat, encoder), image)


def test_names_and_shapes():
  config = CONFIGS["map"]
  params = random_params(config)
  flat = timm_vit.name_map(config).to_theirs(params, config)
  expected = {
    "cls_token": (1, 1, 16),
    "pos_embed": (1, 10, 16),
    "patch_embed.proj.weight": (16, 3, 4, 4),
    "patch_embed.proj.bias": (16,),
    "blocks.2.attn.qkv.weight": (48, 16),
    "blocks.2.mlp.fc1.weight": (41, 16),
    "norm.weight": (16,),
    "attn_pool.latent": (1, 1, 16),
    "attn_pool.kv.weight": (32, 16),
    "attn_pool.mlp.fc2.weight": (16, 41),
  }
  assert {name: flat[name].shape for name in expected} == expected
  assert len(flat) == 12 * 3 + 6 + 13
  value = params["pool"]["attn"]["value"]["kernel"]
  np.testing.assert_array_equal(flat["attn_pool.kv.weight"][16:], value.T)
  assert "fc_norm.weight" in timm_vit.name_map(VIT).to_theirs(random_params(VIT), VIT)


@pytest.mark.parametrize("name", ["Ti/16", "S/8", "B/16", "L/14", "So400m/14", "H/14"])
def test_published_architectures(name):
  config = ViTConfig.from_name(name, 224)
  found = timm_vit.name_map(config)
  found.check_complete(config)
  names = [line.theirs for line in (*found.entries, *found.fixed)]
  assert len(names) == len(set(names)) == 12 * config.depth + 6


# The library's arithmetic against ours: a tenth of the product's tolerance, 1e-5 of the largest
# entry. Sums of up to 41 products in float32 differ by 2e-6 in the order of their terms.
RUNS = {
  "towers": dict(config=TOWERS, dtype="bfloat16", preprocess=Preprocess(14, "squash")),
  "map": dict(config=CONFIGS["map"], dtype="float16"),
  # Trained at 14 pixels, exported for 23: positions are recomputed.
  "captioner": dict(
    config=VisionLanguageConfig(
      encoder=dataclasses.replace(VIT, pool="tok", image_size=23), decoder=DECODER
    ),
    params=random_params(VisionLanguageConfig(encoder=VIT, decoder=DECODER)),
  ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_library_computes_the_same(name, tmp_path):
  source = testing.release(**RUNS[name])
  timm_vit.write(tmp_path / "model", source)
  testing.write_probe(tmp_path / "probe", source)
  wanted = testing.ours(source, tmp_path / "probe")
  ours = {name: array for name, array in wanted.items() if name.startswith("image/")}
  theirs = testing.run("run_timm.py", tmp_path / "model", tmp_path / "probe")
  rows = parity.compare(ours, theirs, required=ours)
  assert len(rows) == len(ours)
  for row in rows:
    assert row.ok and row.measured <= row.tolerance / 10, parity.explain(row)
  assert ("image/embedding" in ours) == (name == "towers")
  size = source.encoder.image_size
  assert theirs.arrays["image/pixels"].shape == (3, size, size, 3)
  squashed = "size=(14, 14), interpolation" in theirs.facts["preprocessing"]
  assert squashed == (source.preprocess.fit == "squash")


def test_mistakes_show(tmp_path):
  source = testing.release(VIT)
  timm_vit.write(tmp_path / "model", source)
  testing.write_probe(tmp_path / "probe", source)
  ours = testing.ours(source, tmp_path / "probe")
  file = tmp_path / "model" / timm_vit.WEIGHTS_FILE
  flat = safetensors.numpy.load_file(file)
  name = "blocks.1.attn.proj.weight"  # square: no shape tells
  flat[name] = np.ascontiguousarray(flat[name].T)
  safetensors.numpy.save_file(flat, file, metadata={"format": "pt"})
  config = tmp_path / "model" / timm_vit.CONFIG_FILE
  content = json.loads(config.read_text())
  content["model_args"] |= {"act_layer": "gelu_tanh", "norm_layer": "layernormfp32"}
  config.write_text(json.dumps(content))
  theirs = testing.run("run_timm.py", tmp_path / "model", tmp_path / "probe")
  rows = parity.compare(ours, theirs)
  problems = {row.name: row.problem for row in rows if row.problem}
  assert problems["setting image/blocks.0.mlp.act: activation"] == "is gelu tanh, expected gelu"
  blocks = [row for row in rows if not row.problem and not row.ok]
  assert blocks[0].name == "image/block_02" and blocks[0].max_abs > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(config, dtype, tmp_path):
  source = testing.release(config, dtype=dtype, preprocess=Preprocess(14, "squash"))
  timm_vit.write(tmp_path, source)
  found = timm_vit.read(tmp_path)
  encoder, image = encoder_of(config, source.params)
  assert found.config == encoder
  assert_same(found.params, image)
  assert found.preprocess == source.preprocess
  assert bool(found.notes) == (config is TOWERS)


def folder(path, change_config=None, change_tensors=None):
  """A folder as written for LEARNED, with changes."""
  timm_vit.write(path, testing.release(LEARNED))
  content = json.loads((path / timm_vit.CONFIG_FILE).read_text())
  (change_config or (lambda content: None))(content)
  (path / timm_vit.CONFIG_FILE).write_text(json.dumps(content))
  flat = safetensors.numpy.load_file(path / timm_vit.WEIGHTS_FILE)
  (change_tensors or (lambda flat: None))(flat)
  safetensors.numpy.save_file(flat, path / timm_vit.WEIGHTS_FILE)
  return path


def test_a_bias_of_the_patches_becomes_positions(tmp_path):
  bias = np.linspace(-1, 1, 16, dtype=np.float32)
  timm_vit.write(tmp_path, testing.release(VIT))
  file = tmp_path / timm_vit.WEIGHTS_FILE
  flat = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file({**flat, "patch_embed.proj.bias": bias}, file)
  found = timm_vit.read(tmp_path)
  assert found.config == dataclasses.replace(VIT, position="learned")
  assert "patch_embed.proj.bias" in found.notes[0]
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 14, 14, 3)), jnp.float32)
  # The same function: what enters the blocks is higher by the bias, but for the cls token.
  got = ov_models.bind(found.config, found.params).hidden_states(images)[0]
  plain = ov_models.bind(VIT, testing.release(VIT).params).hidden_states(images)[0]
  # One rounding of sums of 1: 2e-7.
  np.testing.assert_allclose(got[:, 1:], plain[:, 1:] + bias, atol=1e-6)
  np.testing.assert_array_equal(got[:, 0], plain[:, 0])


def test_a_classifier_of_the_library_is_read(tmp_path):
  """As hubs hold them: no arguments, a head, another crop."""

  def plain(content):
    del content["model_args"]
    content["architecture"] = "vit_tiny_patch4_14"
    content["pretrained_cfg"] |= {"crop_pct": 0.9, "interpolation": "bicubic"}

  def with_head(flat):
    flat |= {"head.weight": np.ones((5, 16), np.float32), "head.bias": np.ones(5, np.float32)}

  with pytest.raises(ValueError, match="num_heads is missing, and the sizes do not match"):
    timm_vit.read(folder(tmp_path / "a", plain, with_head))

  def with_heads(content):
    plain(content)
    content["model_args"] = {"num_heads": 2}

  found = timm_vit.read(folder(tmp_path / "b", with_heads, with_head))
  assert found.config == LEARNED
  assert_same(found.params, testing.release(LEARNED).params)
  assert [note.split(":")[0] for note in found.notes] == [
    "head.bias, head.weight not imported", "preprocessing"
  ]  # fmt: skip


def like_dinov2(flat):
  flat["blocks.0.ls1.gamma"] = np.ones(16, np.float32)
  flat["reg_token"] = np.ones((1, 4, 16), np.float32)


REFUSED = {
  "dinov2": (
    lambda c: c["model_args"].update(init_values=1e-5, reg_tokens=4),
    like_dinov2,
    [
      "model_args.init_values=1e-05 (must be None)", "model_args.reg_tokens=4 (must be 0)",
      "tensor blocks.0.ls1.gamma (layer scale", "tensor reg_token (register tokens)",
    ],
  ),
  "others": (
    lambda c: (
      c["model_args"].update(
        qkv_bias=False, act_layer="quick_gelu", global_pool="max", norm_layer="rmsnorm"
      )
    ),
    lambda flat: flat.pop("blocks.0.attn.qkv.bias"),
    [
      "model_args.qkv_bias=False (must be True)", "model_args.act_layer='quick_gelu' (unknown)",
      "model_args.norm_layer='rmsnorm' (unknown)", "global_pool='max' (must be avg, token, map)",
      "no tensor blocks.0.attn.qkv.bias",
    ],
  ),
  "pools": (
    lambda c: c["model_args"].update(global_pool="map"),
    None,
    ["model_args.pool_include_prefix=False (must be True)"],
  ),
  "eva": (
    lambda c: c.update(architecture="eva02_tiny_patch14_224"), None, ["architecture='eva02_tiny"]
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_rejected(name, tmp_path):
  change_config, change_tensors, expected = REFUSED[name]
  with pytest.raises(ValueError, match="is not a supported model") as error:
    timm_vit.read(folder(tmp_path, change_config, change_tensors))
  for line in expected:
    assert line in str(error.value)
  assert len(str(error.value).splitlines()) == 1 + len(expected)


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
  def change(flat):
    del flat["blocks.1.norm2.bias"]
    flat["blocks.3.norm1.bias"] = np.ones(16, np.float32)

  with pytest.raises(ValueError) as error:
    timm_vit.read(folder(tmp_path, None, change))
  assert "missing blocks.1.norm2.bias" in str(error.value)
  assert "missing blocks.3.norm1.weight" in str(error.value)
  with pytest.raises(ValueError, match="names no architecture"):
    timm_vit.read(folder(tmp_path, lambda content: content.pop("architecture")))
  with pytest.raises(ValueError, match="a text tower alone has no image tower"):
    timm_vit.name_map(TEXT)
