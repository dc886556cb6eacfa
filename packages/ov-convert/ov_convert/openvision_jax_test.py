"""The name map is complete and reversible, and says what does not fit."""

import jax
import numpy as np
import pytest

from ov_convert import openvision_jax
import ov_models
from ov_models import CaptionerConfig, ViTConfig

VIT = ViTConfig(width=16, depth=3, mlp_dim=24, num_heads=2, patch_size=4, image_size=8)
PAIR = CaptionerConfig.openvision2(
  "mu/8", "Ti", image_size=16, vocab_size=11, preset="openvision2_released",
  decoder_options={"depth": 2},
)  # fmt: skip


def random_params(config):
  leaves, tree = jax.tree.flatten(ov_models.abstract_params(config))
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [rng.normal(size=a.shape).astype(a.dtype) for a in leaves])


@pytest.mark.parametrize("split_heads", [False, True])
@pytest.mark.parametrize("config", [VIT, PAIR], ids=["vit", "captioner"])
def test_round_trip_is_exact(config, split_heads):
  params = random_params(config)
  flat = openvision_jax.to_theirs(params, config, split_heads=split_heads)
  back = openvision_jax.to_ours(flat, config)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


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


def test_decoder_kernels_stay_2d():
  flat = openvision_jax.to_theirs(random_params(PAIR), PAIR, split_heads=True)
  block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
  assert flat[f"img_encoder/{block}"].ndim == 3
  assert flat[f"txt_decoder/{block}"].ndim == 2


def test_their_tree_of_the_published_size():
  # Ti/16 with decoder Ti: number of tensors and of parameters as published.
  config = CaptionerConfig.openvision2("Ti/16", "Ti", image_size=160, preset="openvision2_released")
  entries = openvision_jax.name_map(config)
  assert len(entries) == len({e.theirs for e in entries}) == 12 * 16 + 4 + 12 * 16 + 5
  assert ov_models.num_params(config) == 23_150_016


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
    "left over img/head/kernel (16, 4)",
    "img/embedding/kernel is (2, 2, 3, 16), expected (4, 4, 3, 16)",
  ):
    assert line in str(error.value)


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
  ours = CaptionerConfig.openvision2("mu/8", "Ti", image_size=16, vocab_size=11)
  with pytest.raises(ValueError, match="decoder/position_embedding"):
    openvision_jax.name_map(ours)
