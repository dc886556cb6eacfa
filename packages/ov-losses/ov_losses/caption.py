"""Caption cross-entropy from hidden states and a head matrix, without materialised [B,T,V] logits.

  nll_bt  = logsumexp_v(x_bt . w_v) - x_bt . w_label            x = hidden, w = head columns
  loss    = sum(mask * ((1-a) nll + a uniform + z lse^2)) / (sum(mask) + 1e-8)

`uniform` is the cross-entropy against the uniform distribution (label smoothing a), `lse` the
logarithm of the partition function (z-loss, Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
section 5). `ov_losses.tiles` computes the logits for a few token columns at a time.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ov_losses import contexts
from ov_losses.shapes import AnyArray
from ov_losses.tiles import TokenTerms, token_terms, weighted_sum

Weights = Bool[AnyArray, "B T"] | Float[AnyArray, "B T"]


class CaptionLoss(NamedTuple):
  """Loss and metrics of a batch: float32 scalars. Only `loss` is differentiable."""

  loss: Float[Array, ""]  # masked mean with label smoothing and z-loss
  nll: Float[Array, ""]  # masked mean negative log-likelihood in nats
  num_tokens: Float[Array, ""]  # sum of the mask
  num_correct: Float[Array, ""]  # masked count of labels that have the strictly largest logit


def caption_cross_entropy(
  hidden: Float[AnyArray, "B T D"],
  head: Float[AnyArray, "D V"],
  labels: Integer[AnyArray, "B T"],
  mask: Weights,
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  tile: int | None = None,
  batch_shards: int = 1,
) -> CaptionLoss:
  """Compute the masked mean cross-entropy over all tokens of the global batch.

  The logits are computed in the dtype of `hidden` (`head` is cast to it) with float32 accumulation;
  softmax, loss and sums are float32. Gradients have the dtypes of `hidden` and `head`. They are
  computed in the forward pass, which saves one logits-sized matmul over recomputing the logits in
  the backward pass.

  A batch without tokens has loss 0 and zero gradients. An out-of-range label with a nonzero mask
  produces a NaN loss, because jitted code cannot raise.

  Args:
    hidden: decoder states after the final norm, float32 or bfloat16.
    head: output matrix; column v scores token v.
    labels: target ids, for example from `shift_left`; in [0, V) where the mask is nonzero.
    mask: nonnegative weight of each target; 0 excludes it. Not differentiated.
    label_smoothing: fraction in [0, 1) of the target mass that is spread evenly over V.
    z_loss: nonnegative weight of lse^2, which keeps the partition function near 1.
    tile: maximum number of token columns per scan step, 16 by default. Memory is about
      B * tile * V * 4 bytes.
    batch_shards: number of devices that the batch axis is split over. It does not change the
      result; the gradient of the head is summed across devices once instead of once per tile.

  Raises:
    ValueError: if a shape, dtype or option is invalid.
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
  # An out-of-range label gives a NaN term, hence a NaN loss.
  nll = _masked_sum(_nan_where_label_is_invalid(terms, labels, head.shape[1]), weights)
  return CaptionLoss(
    loss=jnp.where(jnp.isnan(nll), jnp.nan, loss),
    nll=nll / denominator,
    num_tokens=num_tokens,
    num_correct=_masked_sum(terms.correct, weights),
  )


def sequence_log_likelihood(
  hidden: Float[AnyArray, "B T D"],
  head: Float[AnyArray, "D V"],
  labels: Integer[AnyArray, "B T"],
  mask: Weights,
  tile: int | None = None,
) -> Float[Array, " B"]:
  """Return log p(labels) of each row, summed over its unmasked tokens, in float32 nats.

  The arguments are those of `caption_cross_entropy`. A row without tokens has log-likelihood 0.
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


def shift_left(
  ids: Integer[AnyArray, "B T"], pad_id: int
) -> tuple[Integer[Array, "B T"], Bool[Array, "B T"]]:
  """Return the next-token targets of ids and their mask.

  Position t predicts ids[t + 1]; the target of the last position is `pad_id`.

  Returns:
    Targets in the dtype of `ids`, and a mask that is true where the target is not padding.

  Examples:
    >>> import jax.numpy as jnp
    >>> import ov_losses
    >>> targets, mask = ov_losses.shift_left(jnp.array([[1, 7, 8, 2, 0]]), pad_id=0)
    >>> targets.tolist(), mask.tolist()
    ([[7, 8, 2, 0, 0]], [[True, True, True, False, False]])
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
    raise ValueError(f"mask has shape {mask.shape}; expected the shape of labels, {labels.shape}.")
  return jax.lax.stop_gradient(mask.astype(jnp.float32))


def _nan_where_label_is_invalid(terms: TokenTerms, labels: jax.Array, vocab: int) -> jax.Array:
  return jnp.where((labels >= 0) & (labels < vocab), terms.nll, jnp.nan)


def _masked_sum(x: jax.Array, weights: jax.Array, axis: int | None = None) -> jax.Array:
  """Return the sum of weights * x; entries of x with weight 0 are ignored, even if NaN."""
  return jnp.sum(jnp.where(weights > 0, x * weights, 0.0), axis=axis)
