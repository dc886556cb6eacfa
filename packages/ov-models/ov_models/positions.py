"""Position embeddings: sine-cosine tables and resampling of learned tables."""

import functools
from typing import Literal

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


@functools.lru_cache(maxsize=16)
def sincos2d(height: int, width: int, dim: int) -> Float[np.ndarray, "{height*width} {dim}"]:
  """Return the sine-cosine positions of a `height` x `width` grid, row-major.

  Row for (y, x) is concat[sin(x w), cos(x w), sin(y w), cos(y w)], w_k = 10000^(-k / (K - 1)),
  k = 0..K-1, K = dim / 4. The denominator K - 1 follows MoCo v3
  (https://arxiv.org/abs/2104.02057); MAE divides by K.

  Raises:
    ValueError: if dim is not a multiple of 4, or is 4, which has a single frequency.

  Examples:
    >>> import ov_models
    >>> ov_models.sincos2d(2, 3, 8).shape  # 2 x 3 patches, width 8
    (6, 8)
  """
  check_sincos_dim(dim, 4)
  y, x = np.divmod(np.arange(height * width), width)
  return np.concatenate([_sincos(x, dim // 4), _sincos(y, dim // 4)], axis=1)


@functools.lru_cache(maxsize=16)
def sincos1d(length: int, dim: int) -> Float[np.ndarray, "{length} {dim}"]:
  """Return the 1-D sine-cosine positions; row t is concat[sin(t w), cos(t w)]."""
  check_sincos_dim(dim, 2)
  return _sincos(np.arange(length), dim // 2)


def check_sincos_dim(dim: int, parts: int) -> None:
  """Raise ValueError unless `dim` splits into `parts` with at least two frequencies each."""
  if dim % parts or dim < 2 * parts:
    raise ValueError(
      f"width={dim} cannot hold sine-cosine positions; it must be a multiple of {parts} and at "
      f"least {2 * parts} (nearest: {max(2 * parts, round(dim / parts) * parts)}), or use "
      "position='learned'."
    )


def _sincos(position: np.ndarray, num_frequencies: int) -> np.ndarray:
  # Computed in float64 on the host, so that the table is the same on every backend.
  omega = 10000.0 ** -(np.arange(num_frequencies) / (num_frequencies - 1))
  angle = position[:, None] * omega
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def resample_positions(
  table: Float[Array | np.ndarray, "rows D"],
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  num_prefix: int = 1,
  method: Literal["bilinear", "bicubic"] = "bilinear",
) -> Float[Array, "new_rows D"]:
  """Resample a learned position table to another patch grid.

  Args:
    table: R + h * w rows: the prefix, then the patches row-major.
    old_grid: patch grid (h, w) of the table.
    new_grid: target patch grid (h', w').
    num_prefix: number R of tokens before the patches.
    method: interpolation.

  Returns:
    R + h' * w' rows: the unchanged prefix, then the resampled patches, antialiased if the grid
    shrinks.

  Raises:
    ValueError: if the table does not have R + h * w rows.
  """
  rows = num_prefix + old_grid[0] * old_grid[1]
  if table.ndim != 2 or table.shape[0] != rows:
    raise ValueError(
      f"position table of shape {tuple(table.shape)} does not match grid {old_grid}; "
      f"expected [{rows}, D] = [{num_prefix} + h * w, D]. Pass the grid the table was made for."
    )
  if old_grid == new_grid:
    return jnp.asarray(table)
  grid = rearrange(table[num_prefix:], "(h w) d -> h w d", h=old_grid[0])
  grid = jax.image.resize(grid, (*new_grid, grid.shape[2]), method, antialias=True)
  return jnp.concatenate([table[:num_prefix], rearrange(grid, "h w d -> (h w) d")])
