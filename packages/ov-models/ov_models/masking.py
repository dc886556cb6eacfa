"""Token masking: random and grid subsets of an exact size."""

import functools

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, Shaped
import numpy as np


def num_kept(num_tokens: int, ratio: float) -> int:
  """Return K = max(1, int(num_tokens * ratio)), corrected for rounding (100 * 0.29 = 28.99...)."""
  return max(1, int(num_tokens * ratio + 1e-6))


def take_tokens(
  tokens: Shaped[Array, "#B T *rest"] | Shaped[np.ndarray, "#B T *rest"],
  index: Int[Array, "B K"] | Int[Array, " K"],
) -> Shaped[Array, "#B K *rest"]:
  """Return the tokens at `index`."""
  if index.ndim == 1:
    return jnp.asarray(tokens)[:, index]
  return jnp.take_along_axis(tokens, index[(..., *[None] * (tokens.ndim - 2))], axis=1)


def random_index(
  key: PRNGKeyArray, batch: int, num_tokens: int, keep: int, *, ordered: bool
) -> Int[Array, "{batch} {keep}"]:
  """Return an independent uniform subset per example, ascending if `ordered`."""
  noise = jax.random.uniform(key, (batch, num_tokens), jnp.float32)  # float32 with x64 too
  index = jnp.argsort(noise, axis=1)[:, :keep]
  return jnp.sort(index, axis=1) if ordered else index


def grid_index(
  key: PRNGKeyArray, batch: int, grid: tuple[int, int], keep: int
) -> Int[Array, "{batch} {keep}"]:
  """Return the ascending indices of a randomly shifted regular lattice per example.

  Tokens are ranked by a Bayer (ordered dither) matrix with a random offset, and the K lowest ranks
  are kept. K = T/2 gives a checkerboard, T/4 every second row and column; other K fill the next
  lattice evenly, so any ratio in [0, 1) works. Grid masking: CLIPA, https://arxiv.org/abs/2305.07017.
  """
  bayer = jnp.asarray(_bayer(max(grid)))
  size = bayer.shape[0]
  offset = jax.random.randint(key, (batch, 2, 1, 1), 0, size)
  y, x = jnp.mgrid[: grid[0], : grid[1]]
  rank = bayer[(y + offset[:, 0]) % size, (x + offset[:, 1]) % size]
  rank = rearrange(rank, "b h w -> b (h w)")
  return jnp.sort(jnp.argsort(rank, axis=1)[:, :keep], axis=1)


def fixed_index(grid: tuple[int, int], keep: int) -> Int[np.ndarray, " {keep}"]:
  """Return the ascending indices of a deterministic, evenly spread subset."""
  rank = _bayer(max(grid))[: grid[0], : grid[1]].reshape(-1)
  return np.sort(np.argsort(rank, kind="stable")[:keep])


@functools.lru_cache(maxsize=16)
def _bayer(at_least: int) -> np.ndarray:
  """Return the M x M Bayer matrix, where M is `at_least` rounded up to a power of two."""
  matrix = np.zeros((1, 1), np.int32)
  while matrix.shape[0] < at_least:
    matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
  return matrix
