"""Tests of the functional API: parameter trees, names and binding."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ov_models
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig
from ov_models.testing import random_params

VIT = ViTConfig(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16)
PAIR = VisionLanguageConfig.openvision2(
  "mu/8", "Ti", image_size=16, vocab_size=11, max_len=5, decoder_options={"depth": 2}
)
TEXT = TextConfig(width=32, depth=2, mlp_dim=64, num_heads=2, vocab_size=11, max_len=6)
TOWERS = VisionLanguageConfig.from_names(
  "mu/8", "Ti", "Ti", image_size=16, vocab_size=11, bias_init=-10.0, text_options={"depth": 2},
  decoder_options={"depth": 2},
)  # fmt: skip
CONFIGS = [
  VIT,
  PAIR,
  dataclasses.replace(VIT, position="learned", pool="map"),
  TEXT,
  dataclasses.replace(TEXT, pool="map"),
  TOWERS,
  dataclasses.replace(TOWERS, decoder=dataclasses.replace(PAIR.decoder, parallel=True)),
  dataclasses.replace(TOWERS, text=None, embed_dim=32, bias_init=None),
]


def flatten(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
  return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


@pytest.mark.parametrize("config", CONFIGS)
def test_trees_agree(config):
  params = jax.eval_shape(partial(ov_models.init, config), jax.random.key(0))
  shapes = ov_models.abstract_params(config)
  chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
  assert type(params) is dict
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  shapes, axes = flatten(shapes), flatten(ov_models.logical_axes(config))
  assert shapes.keys() == axes.keys()
  for name in shapes:
    assert len(axes[name]) == len(shapes[name].shape), name
    assert set(axes[name]) <= {"layers", "embed", "mlp", "vocab", "norm", None}
    assert (axes[name][:1] == ("layers",)) == ("blocks" in name.split("/"))
  assert ov_models.num_params(config) == ov_models.num_params(params)


def test_names_and_axes_of_the_captioner():
  axes = flatten(ov_models.logical_axes(PAIR))
  blocks = {
    f"{tower}/blocks/{name}": spec
    for tower in ("encoder", "decoder")
    for name, spec in {
      "attn/query/kernel": ("layers", "embed", "mlp"),
      "attn/key/kernel": ("layers", "embed", "mlp"),
      "attn/value/kernel": ("layers", "embed", "mlp"),
      "attn/out/kernel": ("layers", "mlp", "embed"),
      "mlp/up/kernel": ("layers", "embed", "mlp"),
      "mlp/down/kernel": ("layers", "mlp", "embed"),
      "norm1/scale": ("layers", "norm"),
      "norm2/scale": ("layers", "norm"),
      **{
        f"{name}/bias": ("layers", None)
        for name in (
          "attn/query", "attn/key", "attn/value", "attn/out",
          "mlp/up", "mlp/down", "norm1", "norm2",
        )
      },
    }.items()
  }  # fmt: skip
  assert axes == blocks | {
    "encoder/patch_embed/kernel": (None, None, None, "embed"),
    "encoder/cls": (None,),
    "encoder/norm/scale": ("norm",),
    "encoder/norm/bias": (None,),
    "decoder/embed/embedding": ("vocab", "embed"),
    "decoder/position_embedding": (None, "embed"),
    "decoder/image_proj/kernel": ("embed", None),
    "decoder/norm/scale": ("norm",),
    "decoder/norm/bias": (None,),
    "decoder/head/kernel": ("embed", "vocab"),
  }


def test_weight_decay_applies_to_kernels():
  shapes = flatten(ov_models.abstract_params(PAIR))
  matrices = {n for n, s in shapes.items() if len(s.shape) - ("blocks" in n) >= 2}
  kernels = {n for n in shapes if n.endswith("/kernel")}
  assert matrices - kernels == {"decoder/embed/embedding", "decoder/position_embedding"}
  assert kernels <= matrices


def test_weight_decay_applies_to_heads_and_not_to_scalars():
  shapes = flatten(ov_models.abstract_params(TOWERS))
  matrices = {n for n, s in shapes.items() if len(s.shape) - ("blocks" in n) >= 2}
  kernels = {n for n in shapes if n.endswith("/kernel")}
  assert {"image_head/kernel", "text_head/kernel"} <= kernels <= matrices
  assert matrices - kernels == {
    "text/embed/embedding",
    "text/position_embedding",
    "decoder/queries",
  }


def test_logical_axes_do_not_shard_by_themselves():
  # With a mesh set, flax shards parameters by the metadata keys that it knows.
  mesh = jax.make_mesh((1,), ("embed",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    params = ov_models.init(VIT, jax.random.key(0))
    out = ov_models.bind(VIT, params)(jnp.zeros((1, 16, 16, 3)))
  assert out.pooled.shape == (1, 32)
  chex.assert_trees_all_equal(params, ov_models.init(VIT, jax.random.key(0)))


def test_init_is_a_function_of_the_key():
  a, b = (ov_models.init(VIT, jax.random.key(0)) for _ in range(2))
  chex.assert_trees_all_equal(a, b)
  c = ov_models.init(VIT, jax.random.key(1))
  assert np.abs(a["blocks"]["mlp"]["up"]["kernel"] - c["blocks"]["mlp"]["up"]["kernel"]).max() > 0
  inside = jax.jit(partial(ov_models.init, VIT))(jax.random.key(0))
  # Fusion may change rounding.
  chex.assert_trees_all_close(a, inside, atol=1e-6)


def test_bind_takes_numpy_and_works_under_transformations():
  params = random_params(VIT)
  images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
  out = ov_models.bind(VIT, jax.tree.map(np.asarray, params))(images).pooled
  one = lambda image: ov_models.bind(VIT, params)(image[None]).pooled[0]
  np.testing.assert_allclose(jax.vmap(one)(images), out, atol=1e-4)


def test_bind_lists_every_mismatch():
  params = random_params(VIT)
  del params["cls"]
  params["head"] = {"kernel": jnp.zeros((2, 2))}
  params["norm"]["scale"] = jnp.zeros(7)
  with pytest.raises(ValueError) as error:
    ov_models.bind(VIT, params)
  assert "missing cls (32,)" in str(error.value)
  assert "unexpected head/kernel (2, 2)" in str(error.value)
  assert "norm/scale is (7,), expected (32,)" in str(error.value)


def test_config_of_another_kind():
  with pytest.raises(TypeError, match="DecoderConfig; expected ViTConfig, TextConfig"):
    ov_models.abstract_params(PAIR.decoder)
