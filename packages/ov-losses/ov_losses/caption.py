"""Caption cross-entropy from hidden states and a head matrix, without the [B,T,V] logits.

  nll_bt  = logsumexp_v(x_bt . w_v) - x_bt . w_label            x = hidden, w = head columns
  loss    = sum(mask * ((1-a) nll + a uniform + z lse^2)) / (sum(mask) + 1e-8)

`uniform` is the cross-entropy against the uniform distribution (label smoothing a), `lse` the
logarithm of the partition function (z-loss, Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
section 5). The logits are made by `ov_losses.tiles`, a few token columns at a time.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ov_losses import contexts
from ov_losses.tiles import TokenTerms, token_terms, weighted_sum


class CaptionLoss(NamedTuple):
  """What one batch gives: float32 scalars, of which only the loss has a gradient."""

  loss: jax.Array  # masked mean of the training objective: smoothing and z-loss included
  nll: jax.Array  # masked mean negative log-likelihood in nats, without either
  num_tokens: jax.Array  # sum of the mask
  num_correct: jax.Array  # masked count of labels that have the strictly largest logit


def caption_cross_entropy(
  hidden: jax.Array,  # [B,T,D] float32 or bfloat16
  head: jax.Array,  # [D,V] any float dtype
  labels: jax.Array,  # [B,T] integer, 0 <= label < V wherever mask is not 0
  mask: jax.Array,  # [B,T] bool or float weights >= 0
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  tile: int | None = None,
  batch_shards: int = 1,
) -> CaptionLoss:
  """Masked mean cross-entropy over all tokens of the global batch.

  The logits are products in the dtype of `hidden` (`head` is cast to it) accumulated in float32;
  softmax, loss and sums are float32. Gradients come back in the dtypes of `hidden` and `head`; they
  are made along with the loss, by one product of the size of the logits less than a backward pass
  would need that makes the logits again.

  A batch without any token gives loss 0 and zero gradients. A label outside [0, V) under a mask
  that is not 0 makes the loss NaN: under jit nothing can raise, and no other value would be true.

  Args:
    hidden: decoder states after the last norm.
    head: output matrix; column v scores token v.
    labels: target ids, for example from `shift_left`.
    mask: weight of each target; 0 leaves it out. Not differentiated.
    label_smoothing: share in [0, 1) of the target mass that is spread evenly over V.
    z_loss: weight >= 0 of lse^2, which keeps the partition function near 1.
    tile: most token columns per step of the scan, 16 by default. Memory is about
      B * tile * V * 4 bytes.
    batch_shards: number of devices the batch axis is split over. It changes no value, only the
      traffic: the gradient of the head is then summed across devices once, not once per tile.

  Raises:
    ValueError: on shapes, dtypes or options that do not fit; the message names them.
  """
  if not 0.0 <= label_smoothing < 1.0:
    raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1).")
  if not 0.0 <= z_loss < math.inf:
    raise ValueError(f"z_loss={z_loss}; expected 0 (off) or a small weight such as 1e-4.")
  hidden, head, labels, mask = map(jnp.asarray, (hidden, head, labels, mask))
  compute = functools.partial(
    _caption_cross_entropy,
    label_smoothing=float(label_smoothing),
    z_loss=float(z_loss),
    tile=tile,
    batch_shards=batch_shards,
  )
  return contexts.run(compute, hidden, head, labels, mask)


def _caption_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  *,
  label_smoothing: float,
  z_loss: float,
  tile: int | None,
  batch_shards: int,
) -> CaptionLoss:
  weights = _check_mask(mask, labels)
  num_tokens = jnp.sum(weights)
  denominator = num_tokens + 1e-8
  loss, terms = weighted_sum(
    hidden, head, labels, weights / denominator,
    label_smoothing=label_smoothing, z_loss=z_loss, tile=tile, batch_shards=batch_shards,
  )  # fmt: skip
  # A label that is none makes NaN of nll, and a sum with it in makes NaN of the loss.
  nll = _masked_sum(_nan_where_label_is_invalid(terms, labels, head.shape[1]), weights)
  return CaptionLoss(
    loss=jnp.where(jnp.isnan(nll), jnp.nan, loss),
    nll=nll / denominator,
    num_tokens=num_tokens,
    num_correct=_masked_sum(terms.correct, weights),
  )


def sequence_log_likelihood(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  tile: int | None = None,
) -> jax.Array:
  """log p(labels) of each row, summed over its unmasked tokens: [B] float32, in nats.

  Arguments as in `caption_cross_entropy`. A row without tokens scores 0.
  """
  hidden, head, labels, mask = map(jnp.asarray, (hidden, head, labels, mask))
  compute = functools.partial(_sequence_log_likelihood, tile=tile)
  return contexts.run(compute, hidden, head, labels, mask, rows=hidden)


def _sequence_log_likelihood(
  hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array, *, tile: int | None
) -> jax.Array:
  weights = _check_mask(mask, labels)
  terms = token_terms(hidden, head, labels, tile=tile)
  nll = _nan_where_label_is_invalid(terms, labels, head.shape[1])
  return -_masked_sum(nll, weights, axis=1)


def shift_left(ids: jax.Array, pad_id: int) -> tuple[jax.Array, jax.Array]:
  """Next-token targets of [B,T] ids.

  Position t predicts ids[t + 1]; the last position has nothing to predict and gets `pad_id`.

  Returns:
    targets [B,T] in the dtype of `ids`, and mask [B,T] bool: true where the target is not a pad.
  """
  ids = jnp.asarray(ids)
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids is {ids.dtype}{list(ids.shape)}; expected integers [B, T].")
  return contexts.run(functools.partial(_shift_left, pad_id=pad_id), ids, rows=ids)


def _shift_left(ids: jax.Array, *, pad_id: int) -> tuple[jax.Array, jax.Array]:
  targets = jnp.pad(ids[:, 1:], ((0, 0), (0, min(1, ids.shape[1]))), constant_values=pad_id)
  return targets, targets != pad_id


def _check_mask(mask: jax.Array, labels: jax.Array) -> jax.Array:
  if mask.shape != labels.shape:
    raise ValueError(f"mask has shape {mask.shape}; expected that of labels, {labels.shape}.")
  return jax.lax.stop_gradient(mask.astype(jnp.float32))


def _nan_where_label_is_invalid(terms: TokenTerms, labels: jax.Array, vocab: int) -> jax.Array:
  return jnp.where((labels >= 0) & (labels < vocab), terms.nll, jnp.nan)


def _masked_sum(x: jax.Array, weights: jax.Array, axis: int | None = None) -> jax.Array:
  """Sum of weights * x that ignores x entirely, NaN included, where the weight is 0."""
  return jnp.sum(jnp.where(weights > 0, x * weights, 0.0), axis=axis)
