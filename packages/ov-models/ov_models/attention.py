"""Scaled dot-product attention: one meaning, three implementations.

"xla" runs anywhere and computes scores and softmax in the compute dtype, as the published models
were trained. "cudnn" and "tpu" are fused kernels with a float32 softmax.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ov_models import partition
from ov_models.config import Implementation

MaskKind = Literal["full", "causal", "prefix"]

_LANES = 128  # of a TPU register: sequence blocks are multiples of it


@dataclasses.dataclass(frozen=True)
class Mask:
  """Who attends to whom, kept symbolic so that a kernel can use its structure.

  Attributes:
    kind: "full" all to all; "causal" each token to itself and earlier ones; "prefix" as causal,
      but the first `prefix` tokens are seen by all.
    prefix: number of leading tokens of "prefix".
    keys: bool [B, T], the tokens that may be seen at all (not padding); None for all.
  """

  kind: MaskKind = "full"
  prefix: int = 0
  keys: jax.Array | None = None

  def array(self, length: int) -> np.ndarray:
    """bool [T, T] (query, key), True = attend; without regard to `keys`."""
    if self.kind == "full":
      return np.ones((length, length), bool)
    allowed = np.tril(np.ones((length, length), bool))
    if self.kind == "prefix":
      allowed[:, : self.prefix] = True
    return allowed


FULL = Mask()


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask | jax.Array, implementation: Implementation
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v under `mask`.

  Args:
    q: [B, T, N, H], k and v alike.
    mask: who attends to whom: the same for the whole batch, or bool broadcastable to
      [B, N, T, T] (query, key), True = attend, which needs "xla".
    implementation: "xla", "cudnn" or "tpu".

  Returns:
    [B, T, N, H] in the dtype of q.

  Raises:
    ValueError: the implementation does not run on this platform, or cannot apply the mask.
  """
  if not isinstance(mask, Mask):
    check_implementation(implementation, "a mask that differs between examples")
    return attend_xla(q, k, v, mask)
  needs = {"xla": None, "cudnn": "gpu", "tpu": "tpu"}[implementation]
  if needs not in (None, platform := _platform()):
    raise ValueError(
      f"attention={implementation!r} runs on {needs} only, but this computation is for "
      f"{platform}; set attention='xla'."
    )
  if implementation == "cudnn":
    return _attend_cudnn(q, k, v, mask)
  if implementation == "tpu":
    return _attend_tpu(q, k, v, mask)
  keys = None if mask.keys is None else mask.keys[:, None, None, :]
  if mask.kind == "full":
    return attend_xla(q, k, v, keys)
  return _attend_by_rows(q, k, v, mask, keys)


def check_implementation(implementation: Implementation, what: str) -> None:
  """Raises ValueError unless `implementation` can apply `what`, a mask given as an array."""
  if implementation != "xla":
    raise ValueError(f"attention={implementation!r} has no kernel for {what}; set attention='xla'.")


def attend_xla(
  q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None = None
) -> jax.Array:
  """q [B, T, N, H], k and v [B, S, N, H], allowed bool broadcastable to [B, N, T, S]."""
  # Heads first, as XLA's products of batches are: so the backward pass copies nothing.
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k, v))
  scores = jnp.einsum("bnth,bnsh->bnts", q, k)
  if allowed is not None:
    # The finite minimum, not -inf: a row with nothing to attend to stays finite.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
  return jnp.swapaxes(jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores), v), 1, 2)


def _attend_by_rows(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, keys: jax.Array | None
) -> jax.Array:
  """Under a triangle, 128 queries at a time with the keys that any of them may see, and no more.

  Of the scores of 307 tokens a third is never made.
  """
  length, rows = q.shape[1], mask.array(q.shape[1])
  outputs = []
  for start in range(0, length, _LANES):
    stop = min(start + _LANES, length)
    seen = max(stop, mask.prefix) if mask.kind == "prefix" else stop
    allowed = jnp.asarray(rows[start:stop, :seen])
    if keys is not None:
      allowed &= keys[..., :seen]
    outputs.append(attend_xla(q[:, start:stop], k[:, :seen], v[:, :seen], allowed))
  return jnp.concatenate(outputs, axis=1)


def _attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
  kernel = partial(jax.nn.dot_product_attention, implementation="cudnn")
  if mask.kind != "prefix" and mask.keys is None:
    return kernel(q, k, v, is_causal=mask.kind == "causal")
  # cuDNN takes an explicit mask only at even lengths.
  (q, k, v), static, length = _pad(q, k, v, mask, 2)
  allowed = jnp.asarray(static)[None, None]
  if mask.keys is not None:
    allowed = allowed & _pad_keys(mask.keys, q.shape[1])[:, None, None, :]
  return kernel(q, k, v, mask=allowed)[:, :length]


def _attend_tpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
  # Imported here: Pallas for TPUs takes a second to import and few runs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  (q, k, v), allowed, length = _pad(q, k, v, mask, _LANES)
  block = next(b for b in (4 * _LANES, 3 * _LANES, 2 * _LANES, _LANES) if q.shape[1] % b == 0)

  def run(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    kernel = splash.make_splash_mha_single_device(
      splash.MultiHeadMask([splash.NumpyMask(allowed)] * q.shape[2]),
      block_sizes=splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
      ),
    )  # fmt: skip
    heads_first = [jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v)]
    if keys is None:
      return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)
    # A query sees the keys of its own segment: all queries are of segment 1, as are real keys.
    keys = keys.astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones_like(keys), kv=keys)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)

  args: list[jax.Array] = [q, k, v]
  if mask.keys is not None:
    args.append(_pad_keys(mask.keys, q.shape[1]))
  return partition.per_device(run, [2, 2, 2, None][: len(args)])(*args)[:, :length]


def _pad(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, multiple: int
) -> tuple[list[jax.Array], np.ndarray, int]:
  """Pads T to a multiple; the mask keeps real tokens from padding, the old T comes back last."""
  length = q.shape[1]
  padded = -(-length // multiple) * multiple
  allowed = np.zeros((padded, padded), bool)
  allowed[:length, :length] = mask.array(length)
  allowed[length:, :length] = True  # a row that sees nothing would divide by zero
  pads = ((0, 0), (0, padded - length), (0, 0), (0, 0))
  return [jnp.pad(a, pads) for a in (q, k, v)], allowed, length


def _pad_keys(keys: jax.Array, length: int) -> jax.Array:
  """bool [B, T] -> [B, length]."""
  return jnp.pad(keys, ((0, 0), (0, length - keys.shape[1])))


def _platform() -> str:
  layout = partition.current()
  return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
