"""Tokens of an image encoder with their patch coordinates and segment ids."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from ov_models.masking import take_tokens
from ov_models.shapes import Segments

PerToken = Int[Array, "#B T 2"] | Int[np.ndarray, "#B T 2"]


@struct.dataclass
class Tokens:
  """Tokens of a batch of images.

  `coords` and an array `grid` may have a batch dimension of 1, which broadcasts.

  Attributes:
    x: features. The first `num_prefix` tokens (cls and registers) are not patches.
    coords: row and column of each patch, from 0; (0, 0) for the prefix.
    grid: patch rows and columns of the image: one pair for all tokens, or one per token.
    segments: image of a packed row that a token belongs to, from 1; 0 is padding. Rows with at most
      one image may use bools. None: all tokens belong to segment 1.
    num_prefix: number of tokens before the patches.
  """

  x: Float[Array, "B T D"]
  coords: PerToken
  grid: tuple[int, int] | PerToken
  segments: Segments | None = None
  num_prefix: int = struct.field(pytree_node=False, default=0)

  @property
  def patches(self) -> "Tokens":
    """Return the tokens without the prefix."""
    return self._each(lambda a: a[:, self.num_prefix :], num_prefix=0)

  def with_prefix(self, prefix: Float[Array, "B R D"]) -> "Tokens":
    """Return the tokens with tokens of segment 1 prepended to the prefix."""
    size = prefix.shape[1]

    def extend(a: Any) -> Any:
      if a is self.x:
        return jnp.concatenate([prefix, a], axis=1)
      numpy = np if isinstance(a, np.ndarray) else jnp
      pads = ((0, 0), (size, 0), *[(0, 0)] * (a.ndim - 2))
      return numpy.pad(a, pads, constant_values=0 if a is self.coords else 1)

    return self._each(extend, num_prefix=self.num_prefix + size)

  def take(self, index: Int[Array, "B K"] | Int[Array, " K"]) -> "Tokens":
    """Return the prefix and the patches at `index`, which counts from the first patch."""

    def pick(a: Any) -> Any:
      taken = take_tokens(a[:, self.num_prefix :], index)
      prefix = a[:, : self.num_prefix]
      prefix = jnp.broadcast_to(prefix, (taken.shape[0], *prefix.shape[1:]))
      return jnp.concatenate([prefix, taken], axis=1)

    return self._each(pick)

  def _each(self, change: Callable[[Any], Any], **others: Any) -> "Tokens":
    """Apply `change` to every array [B, T, ...]."""
    names = ["x", "coords"]
    names += [] if isinstance(self.grid, tuple) else ["grid"]
    names += [] if self.segments is None else ["segments"]
    arrays = {name: change(getattr(self, name)) for name in names}
    return dataclasses.replace(self, **arrays, **others)


def grid_coords(grid: tuple[int, int]) -> Int[np.ndarray, "1 T 2"]:
  """Return row and column of every patch of a grid, row-major."""
  return np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=-1)[None]


def is_valid(segments: Segments) -> Bool[Array, "B T"]:
  """Return a mask of the tokens that are not padding."""
  return segments if segments.dtype == bool else segments != 0


def mean_of(x: Float[Array, "B T D"], segments: Segments | None) -> Float[Array, "B D"]:
  """Return the mean over the tokens that are not padding; 0 for a row of padding."""
  if segments is None:
    return x.mean(axis=1)
  valid = is_valid(segments)
  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
  return (x * valid[:, :, None]).sum(axis=1) / count
