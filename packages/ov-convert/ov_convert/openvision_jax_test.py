"""Tests that the name map is complete and reversible, and reports mismatches."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from ov_convert import openvision_jax
import ov_models
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig

VIT = ViTConfig(width=16, depth=3, mlp_dim=24, num_heads=2, patch_size=4, image_size=8)
PAIR = VisionLanguageConfig.openvision2(
  "mu/8", "Ti", image_size=16, vocab_size=11, preset="openvision2_released",
  decoder_options={"depth": 2},
)  # fmt: skip
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=11, max_len=6)
TOWERS = VisionLanguageConfig(
  encoder=VIT,
  text=TEXT,
  decoder=ov_models.QueryDecoderConfig(
    width=20, depth=2, mlp_dim=28, num_heads=2, vocab_size=11, num_queries=5
  ),
  embed_dim=8,
)
CONFIGS = {
  "vit": VIT,
  "text": TEXT,
  "captioner": PAIR,
  "two_towers": TOWERS,
  "without_decoder": dataclasses.replace(TOWERS, decoder=None),
  "without_text": dataclasses.replace(TOWERS, text=None, embed_dim=16),
}


def random_params(config):
  leaves, tree = jax.tree.flatten(ov_models.abstract_params(config))
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [rng.normal(size=a.shape).astype(a.dtype) for a in leaves])


@pytest.mark.parametrize("split_heads", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_is_exact(config, split_heads):
  params = random_params(config)
  flat = openvision_jax.to_theirs(params, config, split_heads=split_heads)
  assert sum(tensor.size for tensor in flat.values()) == ov_models.num_params(config)
  back = openvision_jax.to_ours(flat, config)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  chex.assert_trees_all_equal(back, params)


def test_layers_and_heads_land_where_they_belong():
  params = random_params(VIT)
  flat = openvision_jax.to_theirs(params, VIT, split_heads=True)
  attention = "img/Transformer/encoderblock_2/MultiHeadDotProductAttention_0"
  assert flat[f"{attention}/query/kernel"].shape == (16, 2, 8)
  assert flat[f"{attention}/query/bias"].shape == (2, 8)
  assert flat[f"{attention}/out/kernel"].shape == (2, 8, 16)
  # Column n * H + h of ours is head n, component h of theirs.
  ours = params["blocks"]["attn"]["query"]["kernel"][2]
  np.testing.assert_array_equal(flat[f"{attention}/query/kernel"][:, 1, 3], ours[:, 8 + 3])
  ours = params["blocks"]["attn"]["out"]["kernel"][2]
  np.testing.assert_array_equal(flat[f"{attention}/out/kernel"][1, 3], ours[8 + 3])
  assert flat["img/cls"].shape == (1, 1, 16)


def test_names_and_shapes_of_the_two_towers():
  params = random_params(TOWERS)
  flat = openvision_jax.to_theirs(params, TOWERS, split_heads=True)
  block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0"
  expected = {
    "t": (1,),
    "img/head/kernel": (16, 8),
    "txt/head/kernel": (12, 8),
    "txt/Embed_0/embedding": (11, 12),
    "txt/pos_embedding": (1, 6, 12),
    "txt/encoder_norm/scale": (12,),
    f"txt/{block}/key/kernel": (12, 3, 4),
    f"txt/{block}/out/kernel": (3, 4, 12),
    f"img/{block}/key/kernel": (16, 2, 8),
    f"txt_decoder/{block}/key/kernel": (20, 20),  # theirs are never split
    "txt_decoder/learnable_tokens": (5, 20),
    "txt_decoder/image_projection_layer/kernel": (16, 20),
    "txt_decoder/text_projection_layer/kernel": (12, 20),
    "txt_decoder/decoder_norm/bias": (20,),
    "txt_decoder/head/kernel": (20, 11),
  }
  assert {name: flat[name].shape for name in expected} == expected
  assert {name.split("/")[0] for name in flat} == {"img", "txt", "txt_decoder", "t"}
  # 16 per layer; then embedding, cls and norm; table, positions and norm; queries, two
  # projections, norm and head; two heads and the temperature.
  assert len(flat) == 16 * (3 + 2 + 2) + 4 + 4 + 6 + 3
  np.testing.assert_array_equal(flat["t"][0], params["log_scale"])
  ours = params["text"]["blocks"]["attn"]["key"]["kernel"][1]
  np.testing.assert_array_equal(flat[f"txt/{block}/key/kernel"][:, 2, 1], ours[:, 2 * 4 + 1])


def test_towers_alone_are_those_of_the_pair():
  params = random_params(TOWERS)
  flat = openvision_jax.to_theirs(params, TOWERS)
  text = {name: tensor for name, tensor in flat.items() if name.startswith("txt/")}
  back = openvision_jax.to_ours(text, TEXT, ignore=["txt/head/kernel"])
  chex.assert_trees_all_equal(back, params["text"])
  image = {name: tensor for name, tensor in flat.items() if name.startswith("img/")}
  back = openvision_jax.to_ours(image, VIT, ignore=["img/head/kernel"])
  chex.assert_trees_all_equal(back, params["encoder"])


def test_decoder_kernels_stay_2d():
  flat = openvision_jax.to_theirs(random_params(PAIR), PAIR, split_heads=True)
  block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
  assert flat[f"img_encoder/{block}"].ndim == 3
  assert flat[f"txt_decoder/{block}"].ndim == 2


def test_their_tree_of_the_published_size():
  # Ti/16 with decoder Ti: number of tensors and of parameters as published.
  config = VisionLanguageConfig.openvision2(
    "Ti/16", "Ti", image_size=160, preset="openvision2_released"
  )
  entries = openvision_jax.name_map(config).entries
  assert len(entries) == len({e.theirs for e in entries}) == 12 * 16 + 4 + 12 * 16 + 5
  assert ov_models.num_params(config) == 23_150_016


@pytest.mark.parametrize(
  ("name", "text"), [("Ti/16", "Ti"), ("So400m/14", "So400m"), ("g/14", "g")]
)
def test_their_tree_of_published_two_towers(name, text):
  config = VisionLanguageConfig.from_names(name, text, text, preset="openvision_released")
  entries = openvision_jax.name_map(config).entries
  layers = config.encoder.depth + config.text.depth + config.decoder.depth
  assert len(entries) == len({e.theirs for e in entries}) == 16 * layers + 17


def test_learned_positions_travel():
  config = ViTConfig(
    width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4, image_size=8, position="learned"
  )
  params = random_params(config)
  flat = openvision_jax.to_theirs(params, config)
  assert flat["img/pos_embedding"].shape == (1, 5, 16)
  back = openvision_jax.to_ours(flat, config)
  np.testing.assert_array_equal(back["position_embedding"], params["position_embedding"])


def test_every_misfit_is_listed():
  flat = openvision_jax.to_theirs(random_params(VIT), VIT)
  del flat["img/cls"], flat["img/encoder_norm/bias"]
  flat["img/head/kernel"] = np.zeros((16, 4))
  flat["img/embedding/kernel"] = np.zeros((2, 2, 3, 16))
  with pytest.raises(ValueError) as error:
    openvision_jax.to_ours(flat, VIT)
  for line in (
    "missing img/cls",
    "missing img/encoder_norm/bias",
    "unexpected img/head/kernel (16, 4)",
    "img/embedding/kernel is (2, 2, 3, 16), expected (4, 4, 3, 16)",
  ):
    assert line in str(error.value)


def test_every_misfit_of_two_towers_is_listed():
  flat = openvision_jax.to_theirs(random_params(TOWERS), TOWERS)
  del flat["t"], flat["txt/pos_embedding"]
  flat["b"] = np.zeros(1)
  flat["txt/head/bias"] = np.zeros(8)
  flat["txt_decoder/learnable_tokens"] = np.zeros((1, 5, 20))
  block = "txt/Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
  flat[f"{block}/query/kernel"] = np.zeros((12, 4, 3))
  with pytest.raises(ValueError) as error:
    openvision_jax.to_ours(flat, TOWERS)
  for line in (
    "missing t\n",
    "missing txt/pos_embedding",
    "unexpected b (1,)",
    "unexpected txt/head/bias (8,)",
    "txt_decoder/learnable_tokens is (1, 5, 20), expected (5, 20)",
    f"{block}/query/kernel is (12, 4, 3), expected (12, 12) or (12, 3, 4)",
  ):
    assert line in str(error.value)
  assert len(str(error.value).splitlines()) == 1 + 6
  params = random_params(TOWERS)
  del params["log_scale"]
  params["text_head"]["kernel"] = np.zeros((8, 12), np.float32)
  with pytest.raises(ValueError) as error:
    openvision_jax.to_theirs(params, TOWERS)
  assert "missing log_scale ()" in str(error.value)
  assert "text_head/kernel is (8, 12), expected (12, 8)" in str(error.value)


def test_a_transposed_kernel_is_refused():
  config = ViTConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4, image_size=8)
  flat = openvision_jax.to_theirs(random_params(config), config)
  name = "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
  flat[name] = flat[name].T
  with pytest.raises(ValueError, match=r"is \(24, 16\), expected \(16, 24\)"):
    openvision_jax.to_ours(flat, config)


def test_models_without_counterpart_are_refused():
  pooled = ViTConfig(
    width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4, image_size=8, pool="map"
  )
  with pytest.raises(ValueError, match="pool/probe"):
    openvision_jax.name_map(pooled)
  ours = VisionLanguageConfig.openvision2("mu/8", "Ti", image_size=16, vocab_size=11)
  with pytest.raises(ValueError, match="decoder/position_embedding"):
    openvision_jax.name_map(ours)
  for config, name in (
    (dataclasses.replace(TEXT, pool="map"), "pool/probe"),
    (dataclasses.replace(TOWERS, bias_init=-10.0), "counterpart of bias;"),
    (dataclasses.replace(TOWERS, text=dataclasses.replace(TEXT, pool="map")), "text/pool/probe"),
    (dataclasses.replace(TOWERS, decoder=PAIR.decoder), "decoder/embed/embedding"),
  ):
    with pytest.raises(ValueError, match=name):
      openvision_jax.name_map(config)
