"""Which tokens stay: random subsets and evenly spread (grid) subsets of exact size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def num_kept(num_tokens: int, ratio: float) -> int:
  """K = max(1, int(num_tokens * ratio)); 1e-6 undoes binary rounding (100 * 0.29 = 28.99...)."""
  return max(1, int(num_tokens * ratio + 1e-6))


def take_tokens(tokens: jax.Array, index: jax.Array) -> jax.Array:
  """Picks tokens [B, T, D] by index [B, K] or [K]: [B, K, D]."""
  if index.ndim == 1:
    return tokens[:, index]
  return jnp.take_along_axis(tokens, index[..., None], axis=1)


def random_index(
  key: jax.Array, batch: int, num_tokens: int, keep: int, *, ordered: bool
) -> jax.Array:
  """An independent uniform subset per example: int32 [B, K], ascending if `ordered`."""
  noise = jax.random.uniform(key, (batch, num_tokens), jnp.float32)  # also under x64
  index = jnp.argsort(noise, axis=1)[:, :keep]
  return jnp.sort(index, axis=1) if ordered else index


def grid_index(key: jax.Array, batch: int, grid: tuple[int, int], keep: int) -> jax.Array:
  """A regular lattice per example, shifted at random: int32 [B, K], ascending.

  Tokens are ranked by a Bayer (ordered dither) matrix rolled by a random offset and the K lowest
  ranks stay. K = T/2 gives a checkerboard, T/4 every second row and column, and any other K fills
  the next lattice evenly, so each ratio in [0, 1) works. Grid masking of whole images: CLIPA,
  https://arxiv.org/abs/2305.07017.
  """
  bayer = jnp.asarray(_bayer(max(grid)))
  size = bayer.shape[0]
  offset = jax.random.randint(key, (batch, 2, 1, 1), 0, size)
  y, x = jnp.mgrid[: grid[0], : grid[1]]
  rank = bayer[(y + offset[:, 0]) % size, (x + offset[:, 1]) % size]
  rank = rank.reshape(batch, grid[0] * grid[1])
  return jnp.sort(jnp.argsort(rank, axis=1)[:, :keep], axis=1)


def fixed_index(grid: tuple[int, int], keep: int) -> np.ndarray:
  """The evenly spread subset without randomness: int [K], ascending."""
  rank = _bayer(max(grid))[: grid[0], : grid[1]].reshape(-1)
  return np.sort(np.argsort(rank, kind="stable")[:keep])


@functools.lru_cache(maxsize=16)
def _bayer(at_least: int) -> np.ndarray:
  """The Bayer matrix of the next power of two: each of 0..M*M-1 once, neighbours far apart."""
  matrix = np.zeros((1, 1), np.int32)
  while matrix.shape[0] < at_least:
    matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
  return matrix
