"""Tests of position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models.positions import resample_positions, sincos1d, sincos2d


def test_sincos2d_against_the_formula():
  # Entry by entry, as defined for the published weights.
  height, width, dim = 3, 5, 16
  table = sincos2d(height, width, dim)
  k = dim // 4
  for y in range(height):
    for x in range(width):
      omega = [10000.0 ** (-i / (k - 1)) for i in range(k)]
      expected = (
        [np.sin(x * w) for w in omega] + [np.cos(x * w) for w in omega]
        + [np.sin(y * w) for w in omega] + [np.cos(y * w) for w in omega]
      )  # fmt: skip
      # float32 rounding of entries of at most 1.
      np.testing.assert_allclose(table[y * width + x], expected, atol=1e-7)
  assert table.dtype == np.float32


def test_sincos1d_positions_differ():
  table = sincos1d(50, 8)
  assert table.shape == (50, 8)
  assert len(np.unique(table.round(5), axis=0)) == 50


@pytest.mark.parametrize("dim", [6, 4])
def test_sincos2d_invalid_width(dim):
  with pytest.raises(ValueError, match=f"width={dim} cannot hold sine-cosine"):
    sincos2d(2, 2, dim)


def test_resample_keeps_cls_and_a_linear_field():
  # A field linear in y and x is reproduced by bilinear upsampling, away from the border.
  y, x = np.mgrid[:4, :6]
  table = np.concatenate([np.full((1, 2), 7.0), np.stack([y, x], -1).reshape(-1, 2)])
  table = jnp.asarray(table, jnp.float32)
  new = resample_positions(table, (4, 6), (8, 12))
  assert new.shape == (1 + 96, 2)
  np.testing.assert_array_equal(new[0], [7, 7])
  grid = new[1:].reshape(8, 12, 2)[2:-2, 2:-2]
  centre = lambda n: (np.arange(n) + 0.5) / 2 - 0.5
  np.testing.assert_allclose(grid[:, 0, 0], centre(8)[2:-2], atol=1e-5)
  np.testing.assert_allclose(grid[0, :, 1], centre(12)[2:-2], atol=1e-5)


def test_resample_is_antialiased_and_the_identity_on_the_same_grid():
  table = jax.random.normal(jax.random.key(0), (1 + 64, 3))
  np.testing.assert_array_equal(resample_positions(table, (8, 8), (8, 8)), table)
  stripes = jnp.concatenate([jnp.zeros((1, 1)), jnp.tile(jnp.array([[1.0], [-1.0]]), (32, 1))])
  small = resample_positions(stripes, (8, 8), (2, 2))
  # Without antialiasing the result would be 1 or -1 instead of about 0.
  assert np.abs(small[1:]).max() < 0.2


def test_resample_wrong_grid():
  with pytest.raises(ValueError, match=r"shape \(65, 3\) does not match grid \(7, 7\).*\[50, D\]"):
    resample_positions(jnp.zeros((65, 3)), (7, 7), (2, 2))
