"""Scaled dot-product attention: one meaning, three implementations.

"xla" runs anywhere and computes scores and softmax in the compute dtype, as the published models
were trained. "cudnn" and "tpu" are fused kernels with a float32 softmax.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ov_models.config import Implementation

MaskKind = Literal["full", "causal", "prefix"]


@dataclasses.dataclass(frozen=True)
class Mask:
  """Who attends to whom, kept symbolic so that a kernel can use its structure.

  Attributes:
    kind: "full" all to all; "causal" each token to itself and earlier ones; "prefix" as causal,
      but the first `prefix` tokens are seen by all.
    prefix: number of leading tokens of "prefix".
  """

  kind: MaskKind = "full"
  prefix: int = 0

  def array(self, length: int) -> np.ndarray:
    """bool [T, T] (query, key), True = attend."""
    if self.kind == "full":
      return np.ones((length, length), bool)
    allowed = np.tril(np.ones((length, length), bool))
    if self.kind == "prefix":
      allowed[:, : self.prefix] = True
    return allowed


FULL = Mask()


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, implementation: Implementation
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v under `mask`: [B, T, N, H] each and out.

  Raises:
    ValueError: the implementation does not run on this backend.
  """
  if implementation == "xla":
    allowed = None if mask.kind == "full" else jnp.asarray(mask.array(q.shape[1]))
    return attend_xla(q, k, v, allowed)
  raise NotImplementedError(implementation)


def attend_xla(
  q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None = None
) -> jax.Array:
  """q [B, T, N, H], k and v [B, S, N, H], allowed bool broadcastable to [B, N, T, S]."""
  q = q / jnp.sqrt(q.shape[-1]).astype(q.dtype)
  scores = jnp.einsum("btnh,bsnh->bnts", q, k)
  if allowed is not None:
    # The finite minimum, not -inf: a row with nothing to attend to stays finite.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
  return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
