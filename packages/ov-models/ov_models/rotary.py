"""Two-dimensional rotary position embeddings of patches.

RoPE: https://arxiv.org/abs/2104.09864. Conventions differ in the axis that rotates a pair of
channels, in the unit of the coordinates and in the channels that form a pair:

  "dinov3"  https://arxiv.org/abs/2508.10104: coordinates are 2 (i + 1/2) / size - 1 per axis. The
            first quarter of the channels rotates with the row, the second with the column; channels
            i and i + H / 2 are paired. Angle 2 pi coordinate / base^(j / (H / 4)).
  "pe"      https://arxiv.org/abs/2504.13181: coordinates are patch indices, plus 1 with a cls
            token. The first half of the channels rotates with the column, the second with the row;
            channels 2i and 2i + 1 are paired. Angle coordinate / base^(j / (H / 4)).
  "mrope"   multimodal RoPE with interleaved axes (https://arxiv.org/abs/2511.21631), as in GenLIP:
            coordinates are patch indices. Channels i and i + H / 2 are paired. Pair j rotates with
            the row if j mod 3 = 1 and with the column if j mod 3 = 2; the other pairs belong to
            the time, which is 0 in an image. Angle coordinate / base^(j / (H / 2)).

Tokens of the prefix (cls and registers) are not rotated.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from ov_models.blocks import Heads, Rotate
from ov_models.tokens import Tokens

Kind = Literal["dinov3", "pe", "mrope"]


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
  elif kind == "pe":
    position = position + offset
  if scale is not None:
    position = position * scale
  factors = _factors(kind, head_dim, base)
  # [B, T, H / 2]. Not a matrix product, because accelerators would round its inputs to 16 bits.
  angles = (position[..., None] * (factors if x is np else jnp.asarray(factors, x.float32))).sum(-2)
  is_patch = np.arange(angles.shape[1]) >= tokens.num_prefix
  angles = angles * is_patch[:, None]
  if kind == "pe":
    angles, pairs = x.repeat(angles, 2, axis=-1), _adjacent_pairs
  else:
    angles, pairs = x.concatenate([angles, angles], axis=-1), _half_pairs
  cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, :, None, :] for f in (x.cos, x.sin))

  def turn(heads: Heads) -> Heads:
    x = heads.astype(jnp.float32)
    return (x * cos + pairs(x) * sin).astype(heads.dtype)

  return lambda q, k: (turn(q), turn(k))


def _factors(kind: Kind, head_dim: int, base: float) -> Float[np.ndarray, "2 {head_dim//2}"]:
  """Return the angle of each pair of channels per unit of the row and of the column."""
  pair = np.arange(head_dim // 2)
  if kind == "mrope":
    return (pair % 3 == [[1], [2]]) * base ** -(pair / (head_dim // 2))
  quarter = head_dim // 4
  unit = 2 * np.pi if kind == "dinov3" else 1
  axes = [[0], [1]] if kind == "dinov3" else [[1], [0]]
  return (pair // quarter == axes) * unit * base ** -(pair % quarter / quarter)


def _half_pairs(x: jax.Array) -> jax.Array:
  """Return (-b, a) for pairs (a, b) of channels i and i + H / 2."""
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([-b, a], axis=-1)


def _adjacent_pairs(x: jax.Array) -> jax.Array:
  """Return (-b, a) for pairs (a, b) of channels 2i and 2i + 1."""
  a, b = x[..., ::2], x[..., 1::2]
  return jnp.stack([-b, a], axis=-1).reshape(x.shape)
