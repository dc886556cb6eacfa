"""Two-dimensional rotary position embeddings of patches.

RoPE: https://arxiv.org/abs/2104.09864. Two axial conventions are in use. They differ in the order
of the axes, in the unit of the coordinates and in the channels that form a pair:

  "dinov3"  https://arxiv.org/abs/2508.10104: coordinates are 2 (i + 1/2) / size - 1 per axis. The
            first quarter of the channels rotates with the row, the second with the column; channels
            i and i + H / 2 are paired. Angle 2 pi coordinate / base^(j / (H / 4)).
  "pe"      https://arxiv.org/abs/2504.13181: coordinates are patch indices, plus 1 with a cls
            token. The first half of the channels rotates with the column, the second with the row;
            channels 2i and 2i + 1 are paired. Angle coordinate / base^(j / (H / 4)).

Tokens of the prefix (cls and registers) are not rotated.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from ov_models.blocks import Heads, Rotate
from ov_models.tokens import Tokens

Kind = Literal["dinov3", "pe"]


def rotation(
  kind: Kind,
  tokens: Tokens,
  head_dim: int,
  base: float,
  *,
  offset: int = 0,
  scale: Float[Array, ""] | None = None,
) -> Rotate:
  """Return a function that rotates queries and keys by the positions of `tokens`.

  Args:
    kind: convention, see above.
    tokens: tokens whose coordinates and grid are used.
    head_dim: number H of channels of a head, a multiple of 4.
    base: base of the frequencies.
    offset: added to the patch indices of "pe".
    scale: factor of all coordinates, for augmentation; None for 1.
  """
  x: Any = np if isinstance(tokens.coords, np.ndarray) and scale is None else jnp
  position = x.asarray(tokens.coords, x.float32 if x is jnp else np.float64)
  if kind == "dinov3":
    position = 2 * (position + 0.5) / x.asarray(tokens.grid) - 1
  else:
    position = position + offset
  if scale is not None:
    position = position * scale
  frequency = base ** -(np.arange(head_dim // 4) / (head_dim // 4))
  if kind == "dinov3":
    frequency = 2 * np.pi * frequency
  # [B, T, 2, H / 4]: rows, then columns.
  angles = position[..., None] * (frequency if x is np else jnp.asarray(frequency, jnp.float32))
  is_patch = np.arange(angles.shape[1]) >= tokens.num_prefix
  angles = angles * is_patch[:, None, None]
  if kind == "dinov3":
    halves = angles.reshape(*angles.shape[:2], head_dim // 2)
    angles = x.concatenate([halves, halves], axis=-1)
  else:
    angles = x.repeat(angles[:, :, ::-1], 2, axis=-1).reshape(*angles.shape[:2], head_dim)
  cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, :, None, :] for f in (x.cos, x.sin))
  pairs = _half_pairs if kind == "dinov3" else _adjacent_pairs

  def turn(heads: Heads) -> Heads:
    x = heads.astype(jnp.float32)
    return (x * cos + pairs(x) * sin).astype(heads.dtype)

  return lambda q, k: (turn(q), turn(k))


def _half_pairs(x: jax.Array) -> jax.Array:
  """Return (-b, a) for pairs (a, b) of channels i and i + H / 2."""
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([-b, a], axis=-1)


def _adjacent_pairs(x: jax.Array) -> jax.Array:
  """Return (-b, a) for pairs (a, b) of channels 2i and 2i + 1."""
  a, b = x[..., ::2], x[..., 1::2]
  return jnp.stack([-b, a], axis=-1).reshape(x.shape)
