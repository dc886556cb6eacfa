"""Tests of the vision tower."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ov_models import ViTConfig, abstract_params, bind, num_params, resample_positions
from ov_models.testing import random_params

VIT = ViTConfig(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16)


def images(height=16, width=None, batch=2):
  return jax.random.normal(jax.random.key(7), (batch, height, width or height, 3))


def run(config, x, key=None, params=None):
  params = random_params(config) if params is None else params
  return _forward(config, params, x, key)


@partial(jax.jit, static_argnums=0)
def _forward(config, params, x, key):
  return bind(config, params)(x, key)


def shapes(config, x, key=None):
  return jax.eval_shape(partial(_forward, config), abstract_params(config), x, key)


PUBLISHED = {
  "Ti/16": 5_486_400,
  "Ti/8": 5_375_808,
  "S/16": 21_589_632,
  "S/8": 21_368_448,
  "B/16": 85_646_592,
  "B/8": 85_204_224,
  "L/14": 302_914_560,
  "L/8": 302_509_056,
  "So400m/14": 412_147_440,
  "H/14": 630_434_560,
  "g/14": 1_010_839_168,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  assert num_params(ViTConfig.from_name(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["mu/16", "M/16", "g-opt/14", "G/14", "G-opt/14", "e/14"])
def test_other_variants_build(name):
  config = ViTConfig.from_name(name)
  d, f = config.width, config.mlp_dim
  block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
  patch = config.patch_size**2 * 3 * d
  assert num_params(config) == patch + d + config.depth * block + 2 * d


@pytest.mark.parametrize(
  ("pool", "position"), [("gap", "sincos2d"), ("tok", "learned"), ("map", "sincos2d")]
)
def test_shapes(pool, position):
  out = run(dataclasses.replace(VIT, pool=pool, position=position), images())
  chex.assert_shape(out.pooled, (2, 32))
  chex.assert_shape(out.tokens, (2, 16, 32))
  chex.assert_tree_all_finite(out)


def test_gap_and_tok_by_hand():
  params = random_params(VIT)
  params["norm"]["scale"] = jnp.full(32, 2.0)
  params["norm"]["bias"] = jnp.full(32, 0.5)

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return 2 * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) + 0.5

  gap = run(VIT, images(), params=params)
  np.testing.assert_allclose(gap.pooled, norm(gap.tokens.mean(axis=1)), atol=1e-5)
  tok = run(dataclasses.replace(VIT, pool="tok"), images(), params=params)
  # Pooling does not change the patch tokens.
  np.testing.assert_array_equal(tok.tokens, gap.tokens)
  assert np.abs(tok.pooled - gap.pooled).max() > 0.01


def test_map_pool_depends_on_the_tokens():
  config = dataclasses.replace(VIT, pool="map")
  params = random_params(config)
  pooled = lambda x: run(config, x, params=params).pooled
  assert np.abs(pooled(images()) - pooled(-images())).max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(16, 16), (18, 19), (4, 4), (12, 28), (32, 32)])
@pytest.mark.parametrize("position", ["sincos2d", "learned"])
def test_any_image_size(position, height, width):
  config = dataclasses.replace(VIT, position=position)
  out = shapes(config, images(height, width))
  assert out.tokens.shape == (2, (height // 4) * (width // 4), 32)


def test_remainder_pixels_are_dropped():
  x = images(19, 18)
  np.testing.assert_array_equal(run(VIT, x).tokens, run(VIT, x[:, :16, :16]).tokens)


def test_positions_follow_the_image_shape():
  # 2 x 4 and 4 x 2 grids have different positions.
  x = images(8, 16)
  swapped = run(VIT, jnp.swapaxes(x, 1, 2))
  assert not np.allclose(run(VIT, x).pooled, swapped.pooled, atol=1e-4)


def test_learned_positions_are_resampled_on_the_fly():
  config = dataclasses.replace(VIT, position="learned")
  params = random_params(config)
  large = dataclasses.replace(config, image_size=32)
  resampled = params | {
    "position_embedding": resample_positions(params["position_embedding"], (4, 4), (8, 8))
  }
  x = images(32)
  np.testing.assert_allclose(
    run(config, x, params=params).pooled, run(large, x, params=resampled).pooled, atol=1e-6
  )


@pytest.mark.parametrize("mode", ["random", "grid"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77, 0.99])
def test_masking_keeps_the_right_number(mode, ratio):
  config = dataclasses.replace(VIT, mask_ratio=ratio, mask_mode=mode)
  x = images(20, 28)
  expected = max(1, int(35 * (1 - ratio) + 1e-6))
  out = shapes(config, x, jax.random.key(0))
  assert out.tokens.shape == (2, expected, 32)
  assert shapes(config, x).tokens.shape == (2, 35, 32)  # without a key nothing is dropped


def test_masked_tokens_do_not_matter():
  """Only pixels of kept patches affect the output."""
  config = dataclasses.replace(VIT, mask_ratio=0.5)
  params = random_params(config)
  x = images(batch=1)
  gradient = jax.grad(lambda x: run(config, x, jax.random.key(3), params).pooled.sum())(x)
  per_patch = np.abs(gradient).reshape(4, 4, 4, 4, 3).sum(axis=(1, 3, 4))
  assert (per_patch > 0).sum() == 8


def test_keys_are_explicit():
  config = dataclasses.replace(VIT, mask_ratio=0.5)
  params = random_params(config)
  pooled = lambda key: run(config, images(), key, params).pooled
  np.testing.assert_array_equal(pooled(jax.random.key(1)), pooled(jax.random.key(1)))
  assert np.abs(pooled(jax.random.key(1)) - pooled(jax.random.key(2))).max() > 1e-5
  np.testing.assert_array_equal(pooled(None), run(VIT, images(), None, params).pooled)


def test_bfloat16_computes_in_bfloat16_with_float32_params():
  config = dataclasses.replace(VIT, dtype="bfloat16")
  params = random_params(config)
  assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  out, exact = run(config, images(), params=params), run(VIT, images(), params=params)
  assert out.pooled.dtype == out.tokens.dtype == jnp.bfloat16
  # bfloat16 has 8 bits: each rounding has a relative error of up to 2^-9, and a few tens add up
  # at random, so expect about 1% of the scale.
  scale = np.abs(exact.tokens).max()
  assert np.abs(out.tokens - exact.tokens).max() < 0.03 * scale
  jaxpr = str(jax.make_jaxpr(lambda p, x: bind(config, p)(x).pooled)(params, images()))
  convolutions = [line for line in jaxpr.splitlines() if "conv_general_dilated" in line]
  assert len(convolutions) == 1
  assert "f32" in convolutions[0]  # pixels enter in float32


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((2, 16, 16), r"shape \(2, 16, 16\); expected \[B, H, W, 3\]"),
    ((2, 16, 16, 4), r"shape \(2, 16, 16, 4\); expected \[B, H, W, 3\]"),
    ((2, 3, 16, 3), r"image of 3 x 16 pixels is smaller than one patch of 4"),
  ],
)
def test_invalid_images(shape, message, monkeypatch):
  # Disable the jaxtyping checks, as in production.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    run(VIT, jnp.zeros(shape))


def test_one_trace_over_several_steps():
  params = random_params(VIT)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, x, key):
    return bind(dataclasses.replace(VIT, mask_ratio=0.5), params)(x, key).pooled

  for i in range(3):
    step(params, images() + i, jax.random.key(i))


@pytest.mark.parametrize(
  ("name", "sides", "dropped"),
  [
    ("So400m/14", (384, 384), (6, 6)),
    ("L/14", (224, 224), (0, 0)),
    ("mu/16", (40, 47), (8, 15)),
    ("mu/16", (16, 31), (0, 15)),
  ],
)
def test_dropped_pixels(name, sides, dropped):
  assert ViTConfig.from_name(name).dropped_pixels(*sides) == dropped


def test_dropped_pixels_are_ignored():
  config = dataclasses.replace(VIT, patch_size=8)  # 20 pixels: 2 patches and 4 pixels
  assert config.dropped_pixels(20, 20) == (4, 4)
  whole = images(20)
  border = whole.at[:, 16:].set(99.0).at[:, :, 16:].set(-99.0)
  params = random_params(config)
  chex.assert_trees_all_equal(run(config, whole, params=params), run(config, border, params=params))
  inside = whole.at[:, 15, 15].set(99.0)
  assert not np.allclose(
    run(config, inside, params=params).pooled, run(config, whole, params=params).pooled
  )
