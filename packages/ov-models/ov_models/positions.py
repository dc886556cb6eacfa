"""Position tables: sine-cosine (computed, never stored) and the resampling of learned ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=16)
def sincos2d(height: int, width: int, dim: int) -> np.ndarray:
  """Positions of a `height` x `width` grid, row-major: float32 [height * width, dim].

  Row for (y, x) is concat[sin(x w), cos(x w), sin(y w), cos(y w)], w_k = 10000^(-k / (K - 1)),
  k = 0..K-1, K = dim / 4. The denominator K - 1 is that of MoCo v3
  (https://arxiv.org/abs/2104.02057); MAE divides by K.

  Raises:
    ValueError: dim is not a multiple of 4 (or is 4, which leaves no frequency range).
  """
  check_sincos_dim(dim, 4)
  y, x = np.divmod(np.arange(height * width), width)
  return np.concatenate([_sincos(x, dim // 4), _sincos(y, dim // 4)], axis=1)


@functools.lru_cache(maxsize=16)
def sincos1d(length: int, dim: int) -> np.ndarray:
  """Positions of a line: float32 [length, dim], row t is concat[sin(t w), cos(t w)]."""
  check_sincos_dim(dim, 2)
  return _sincos(np.arange(length), dim // 2)


def check_sincos_dim(dim: int, parts: int) -> None:
  """Raises ValueError unless `dim` splits into `parts` with two frequencies or more in each."""
  if dim % parts or dim < 2 * parts:
    raise ValueError(
      f"width={dim} cannot hold sine-cosine positions; it must be a multiple of {parts} and at "
      f"least {2 * parts} (nearest: {max(2 * parts, round(dim / parts) * parts)}), or use "
      "position='learned'."
    )


def _sincos(position: np.ndarray, num_frequencies: int) -> np.ndarray:
  # In float64 on the host: the same table on every backend, exact to float32.
  omega = 10000.0 ** -(np.arange(num_frequencies) / (num_frequencies - 1))
  angle = position[:, None] * omega
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def resample_positions(
  table: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> jax.Array:
  """Fits a learned position table to another patch grid.

  Args:
    table: [1 + h * w, D], the row of the cls token first, then the patches row-major.
    old_grid: (h, w) of the table.
    new_grid: (h', w') wanted.

  Returns:
    [1 + h' * w', D]: the cls row as it was, the rest bilinear, antialiased when the grid shrinks.

  Raises:
    ValueError: the table does not have 1 + h * w rows.
  """
  rows = 1 + old_grid[0] * old_grid[1]
  if table.ndim != 2 or table.shape[0] != rows:
    raise ValueError(
      f"position table of shape {tuple(table.shape)} does not match grid {old_grid}; "
      f"expected [{rows}, D] = [1 + h * w, D]. Pass the grid the table was made for."
    )
  if old_grid == new_grid:
    return table
  grid = table[1:].reshape(*old_grid, -1)
  grid = jax.image.resize(grid, (*new_grid, grid.shape[-1]), "bilinear", antialias=True)
  return jnp.concatenate([table[:1], grid.reshape(new_grid[0] * new_grid[1], -1)])
