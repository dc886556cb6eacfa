"""Tests of token masking."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import masking


@pytest.mark.parametrize(
  ("tokens", "ratio", "keep"),
  [
    (100, 0.29, 29),  # 100 * 0.29 is 28.999...
    (10, 1 - 0.9, 1),  # 0.999...
    (36, 0.35, 12),
    (256, 0.35, 89),
    (576, 0.35, 201),
    (7, 0.001, 1),  # at least one
    (7, 1.0, 7),
    (49, 1 - 0.75, 12),
  ],
)
def test_num_kept(tokens, ratio, keep):
  assert masking.num_kept(tokens, ratio) == keep


def test_random_index_is_a_subset_per_example():
  index = np.asarray(masking.random_index(jax.random.key(0), 64, 20, 7, ordered=False))
  assert index.shape == (64, 7)
  assert all(len(set(row)) == 7 for row in index)
  assert (np.sort(index, axis=1) != index).any()
  assert len({tuple(sorted(row)) for row in index}) > 60  # rows are independent
  ordered = masking.random_index(jax.random.key(0), 64, 20, 7, ordered=True)
  np.testing.assert_array_equal(ordered, np.sort(index, axis=1))


def test_random_index_is_uniform():
  index = np.asarray(masking.random_index(jax.random.key(1), 4000, 10, 3, ordered=True))
  share = np.bincount(index.ravel(), minlength=10) / 4000
  # Binomial with p = 0.3: the standard error is 0.0072; tolerance: five of them.
  np.testing.assert_allclose(share, 0.3, atol=0.036)


@pytest.mark.parametrize("grid", [(6, 6), (5, 9), (14, 14), (1, 7)])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 1 / 3, 0.5, 0.77])
def test_grid_index_has_exact_size_at_any_ratio(grid, ratio):
  total = grid[0] * grid[1]
  keep = masking.num_kept(total, 1 - ratio)
  index = np.asarray(masking.grid_index(jax.random.key(0), 16, grid, keep))
  assert index.shape == (16, keep)
  assert all(len(set(row)) == keep for row in index)
  assert index.min() >= 0
  assert index.max() < total


def kept_map(index, grid):
  mask = np.zeros(grid[0] * grid[1], bool)
  mask[np.asarray(index)] = True
  return mask.reshape(grid)


def test_grid_index_quarter_is_every_second_row_and_column():
  index = masking.grid_index(jax.random.key(0), 40, (8, 8), 16)
  offsets = set()
  for row in index:
    mask = kept_map(row, (8, 8))
    y, x = np.argwhere(mask)[0]
    np.testing.assert_array_equal(np.argwhere(mask[y::2, x::2]), np.argwhere(np.ones((4, 4))))
    offsets.add((y, x))
  assert offsets == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_grid_index_half_is_a_checkerboard():
  mask = kept_map(masking.grid_index(jax.random.key(0), 1, (8, 8), 32)[0], (8, 8))
  assert (mask[:, 1:] != mask[:, :-1]).all()
  assert (mask[1:] != mask[:-1]).all()


def test_fixed_index_is_evenly_spread():
  mask = kept_map(masking.fixed_index((16, 16), 89), (16, 16))
  assert mask.sum() == 89
  quadrants = mask.reshape(2, 8, 2, 8).sum(axis=(1, 3))
  assert quadrants.min() >= 16
  assert quadrants.max() <= 28


def test_take_tokens():
  tokens = jnp.arange(2 * 5 * 3).reshape(2, 5, 3)
  index = jnp.array([[0, 4], [2, 1]])
  picked = masking.take_tokens(tokens, index)
  chex.assert_trees_all_equal(picked[1, 0], tokens[1, 2])
  chex.assert_trees_all_equal(masking.take_tokens(tokens, jnp.array([3])), tokens[:, 3:4])
