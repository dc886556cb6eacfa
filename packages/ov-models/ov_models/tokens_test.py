"""Tests of Tokens."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import ViTConfig, bind, masking
from ov_models.testing import random_params
from ov_models.tokens import Tokens, grid_coords, mean_of

GRID = (3, 4)
COORDS = grid_coords(GRID)


def numbered(**fields):
  """Return two images of 12 tokens whose features are their coordinates."""
  x = jnp.broadcast_to(jnp.asarray(COORDS, jnp.float32), (2, 12, 2))
  return Tokens(x, COORDS, GRID, **fields)


def test_coordinates_are_row_major():
  np.testing.assert_array_equal(COORDS[0, :5], [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])
  chex.assert_shape(COORDS, (1, 12, 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_take_keeps_coordinates_and_segments(packed, jit):
  index = jnp.array([[1, 5, 7], [11, 0, 4]])
  tokens = numbered()
  if packed:
    segments = jnp.broadcast_to(jnp.arange(12) // 4, (2, 12))
    tokens = tokens.replace(grid=np.broadcast_to(GRID, (1, 12, 2)), segments=segments)
  take = jax.jit(Tokens.take) if jit else Tokens.take
  out = take(tokens.with_prefix(jnp.full((2, 2, 2), 7.0)), index)
  chex.assert_shape([out.x, out.coords], (2, 5, 2))
  assert out.num_prefix == 2
  assert (out.x[:, :2] == 7).all()
  assert not out.coords[:, :2].any()
  np.testing.assert_array_equal(out.patches.x, out.patches.coords)
  np.testing.assert_array_equal(out.patches.coords, COORDS[0][index])
  if packed:
    np.testing.assert_array_equal(out.patches.segments, index // 4)
    assert (out.segments[:, :2] == 1).all()
    assert (out.patches.grid == jnp.array(GRID)).all()
  else:
    assert out.grid == GRID


def test_one_index_for_all_images():
  out = numbered().take(jnp.array([3, 8]))
  np.testing.assert_array_equal(out.x, np.broadcast_to(COORDS[:, [3, 8]], (2, 2, 2)))
  np.testing.assert_array_equal(out.coords[0], COORDS[0, [3, 8]])


def test_prefix_and_patches_are_inverse():
  tokens = numbered(segments=jnp.ones((2, 12), bool))
  again = tokens.with_prefix(jnp.zeros((2, 3, 2))).patches
  chex.assert_trees_all_equal(again, tokens)


@pytest.mark.parametrize("dtype", [bool, jnp.int32])
def test_mean_ignores_padding(dtype):
  x = jax.random.normal(jax.random.key(0), (2, 4, 3))
  segments = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0]]).astype(dtype)
  out = mean_of(x, segments)
  chex.assert_trees_all_close(out, jnp.stack([x[0, :2].mean(0), jnp.zeros(3)]), atol=1e-6)
  chex.assert_trees_all_equal(mean_of(x, None), x.mean(axis=1))


@pytest.mark.parametrize("mode", ["random", "grid"])
def test_masked_encoder_keeps_patch_coordinates(mode):
  config = ViTConfig.from_name("mu/4", 16, mask_ratio=0.5, mask_mode=mode)
  model, key = bind(config, random_params(config)), jax.random.key(3)
  tokens = model._embed(jax.random.normal(key, (2, 16, 24, 3)))
  kept = model._drop(tokens, key)
  rows = jnp.take_along_axis(
    tokens.x, 1 + kept.coords[:, 1:, :1] * 6 + kept.coords[:, 1:, 1:], axis=1
  )
  chex.assert_trees_all_equal(kept.patches.x, rows)
  chex.assert_shape(kept.patches.x, (2, masking.num_kept(24, 0.5), 32))


@pytest.mark.parametrize("pool", ["gap", "map", "tok"])
def test_pooled_images_do_not_depend_on_padding(pool):
  config = ViTConfig.from_name("mu/4", 16, pool=pool)
  model = bind(config, random_params(config))
  tokens = model._embed(jax.random.normal(jax.random.key(0), (2, 16, 16, 3)))
  real = jnp.broadcast_to(jnp.arange(17) < 12, (2, 17))
  short = tokens.replace(x=tokens.x[:, :12], coords=tokens.coords[:, :12])
  padded = tokens.replace(x=jnp.where(real[..., None], tokens.x, 9.0), segments=real)
  chex.assert_trees_all_close(model._pool(padded), model._pool(short), atol=1e-5)
