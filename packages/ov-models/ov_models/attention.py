"""Scaled dot-product attention in three implementations.

"xla" runs anywhere and computes scores and softmax in the compute dtype, as the published models
were trained. "cudnn" and "tpu" are fused kernels with a float32 softmax.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from ov_models.config import Implementation
from ov_models.partition import HEADS, per_device, platform

MaskKind = Literal["full", "causal", "prefix"]

_LANES = 128  # TPU lane count; sequence blocks are multiples of it


@dataclasses.dataclass(frozen=True)
class Mask:
  """Symbolic attention mask, so that kernels can use its structure.

  Attributes:
    kind: "full": no mask; "causal": each token attends to itself and earlier tokens; "prefix":
      causal, and all tokens attend to the first `prefix` tokens.
    prefix: number of prefix tokens of kind "prefix".
  """

  kind: MaskKind = "full"
  prefix: int = 0

  def array(self, length: int) -> Bool[np.ndarray, "T T"]:
    """Return the bool mask [query, key]; True where the query may attend to the key."""
    if self.kind == "full":
      return np.ones((length, length), bool)
    allowed = np.tril(np.ones((length, length), bool))
    if self.kind == "prefix":
      allowed[:, : self.prefix] = True
    return allowed


FULL = Mask()


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S N H"],
  v: Float[Array, "B S N H"],
  mask: Mask | Bool[Array, "..."],
  implementation: Implementation,
  segments: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
  """Compute softmax(q k^T / sqrt(H)) v under `mask`.

  Args:
    q: queries. T and S may differ only with a full mask and without integer segments.
    k: keys.
    v: values.
    mask: symbolic mask for the whole batch, or a bool array broadcastable to [B, N, T, S]
      (query, key), True where a query may attend to a key. Arrays require "xla".
    implementation: attention implementation, "xla", "cudnn" or "tpu".
    segments: segment ids, see Tokens. A token attends to its own segment only. Padding attends to
      segment 1, so that all rows are finite.

  Returns:
    The attended values in the dtype of q.

  Raises:
    ValueError: if the implementation does not support the platform or the mask.
  """
  if not isinstance(mask, Mask):
    check_implementation(implementation, "a mask that differs between examples")
    return attend_xla(q, k, v, mask if segments is None else mask & _same_segment(segments))
  needs = {"xla": None, "cudnn": "gpu", "tpu": "tpu"}[implementation]
  if needs not in (None, here := platform()):
    raise ValueError(
      f"attention={implementation!r} runs on {needs} only, but this computation is for "
      f"{here}; set attention='xla'."
    )
  if implementation == "cudnn":
    return _attend_cudnn(q, k, v, mask, segments)
  if implementation == "tpu":
    return _attend_tpu(q, k, v, mask, segments)
  if mask.kind == "full":
    return attend_xla(q, k, v, None if segments is None else _same_segment(segments))
  return _attend_in_query_blocks(q, k, v, mask, segments)


def _same_segment(segments: jax.Array) -> jax.Array:
  """Return a bool mask [B, 1, T, T] (query, key), or [B, 1, 1, T] for bool segments."""
  keys = segments[:, None, None, :]
  return keys if keys.dtype == bool else jnp.maximum(segments[:, None, :, None], 1) == keys


def check_implementation(implementation: Implementation, what: str) -> None:
  """Raise ValueError unless `implementation` supports array masks; `what` names the mask."""
  if implementation != "xla":
    raise ValueError(f"attention={implementation!r} has no kernel for {what}; set attention='xla'.")


def attend_xla(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S N H"],
  v: Float[Array, "B S N H"],
  allowed: Bool[Array, "..."] | None = None,
) -> Float[Array, "B T N H"]:
  """Compute `attend` under `allowed`, broadcastable to [B, N, T, S]."""
  # Heads before tokens is the layout of batched matmuls in XLA: no copies in the backward pass.
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k, v))
  scores = jnp.einsum("bnth,bnsh->bnts", q, k)
  if allowed is not None:
    # The finite minimum instead of -inf keeps fully masked rows finite.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
  return jnp.swapaxes(jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores), v), 1, 2)


def _attend_in_query_blocks(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, segments: jax.Array | None
) -> jax.Array:
  """Compute causal or prefix attention in query blocks of 128 that skip fully masked keys.

  For T = 307 this avoids a third of the scores.
  """
  length, rows = q.shape[1], mask.array(q.shape[1])
  same = None if segments is None else _same_segment(segments)
  outputs = []
  for start in range(0, length, _LANES):
    stop = min(start + _LANES, length)
    seen = max(stop, mask.prefix) if mask.kind == "prefix" else stop
    allowed = jnp.asarray(rows[start:stop, :seen])
    if same is not None:
      allowed &= (same if same.shape[2] == 1 else same[:, :, start:stop])[..., :seen]
    outputs.append(attend_xla(q[:, start:stop], k[:, :seen], v[:, :seen], allowed))
  return jnp.concatenate(outputs, axis=1)


def _attend_cudnn(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, segments: jax.Array | None
) -> jax.Array:
  kernel = partial(jax.nn.dot_product_attention, implementation="cudnn")
  if mask.kind != "prefix" and segments is None:
    return kernel(q, k, v, is_causal=mask.kind == "causal")
  # cuDNN takes an explicit mask only at even lengths.
  (q, k, v), static, length = _pad(q, k, v, mask, 2)
  allowed = jnp.asarray(static)[None, None]
  if segments is not None:
    allowed = allowed & _same_segment(_pad_segments(segments, q.shape[1]))
  return kernel(q, k, v, mask=allowed)[:, :length]


def _attend_tpu(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, segments: jax.Array | None
) -> jax.Array:
  # Imported here because Pallas for TPUs takes a second to import.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  (q, k, v), allowed, length = _pad(q, k, v, mask, _LANES)
  block = next(b for b in (4 * _LANES, 3 * _LANES, 2 * _LANES, _LANES) if q.shape[1] % b == 0)

  def run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    kernel = splash.make_splash_mha_single_device(
      splash.MultiHeadMask([splash.NumpyMask(allowed)] * q.shape[2]),
      block_sizes=splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
      ),
    )  # fmt: skip
    args: list[Any] = [jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v)]
    if ids is not None:
      ids = ids.astype(jnp.int32)
      args.append(splash.SegmentIds(q=jnp.maximum(ids, 1), kv=ids))
    return jnp.swapaxes(jax.vmap(kernel)(*args), 1, 2)

  args: list[jax.Array] = [q, k, v]
  if segments is not None:
    args.append(_pad_segments(segments, q.shape[1]))
  names = (HEADS, HEADS, HEADS, ("batch", "length"))[: len(args)]
  return per_device(run, names)(*args)[:, :length]


def _pad(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, multiple: int
) -> tuple[list[jax.Array], np.ndarray, int]:
  """Pad T to a multiple; return q, k, v, a mask that excludes padding, and the original T."""
  length = q.shape[1]
  padded = -(-length // multiple) * multiple
  allowed = np.zeros((padded, padded), bool)
  allowed[:length, :length] = mask.array(length)
  allowed[length:, :length] = True  # fully masked rows would divide by zero
  pads = ((0, 0), (0, padded - length), (0, 0), (0, 0))
  return [jnp.pad(a, pads) for a in (q, k, v)], allowed, length


def _pad_segments(segments: jax.Array, length: int) -> jax.Array:
  """Pad segments [B, T] -> [B, length]."""
  return jnp.pad(segments, ((0, 0), (0, length - segments.shape[1])))
