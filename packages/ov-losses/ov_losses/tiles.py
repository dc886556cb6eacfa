"""Tiled softmax terms of a linear head, computed for a few token columns at a time.

The [B,T,V] logits of a caption batch are large: 64 captions of 127 tokens with a vocabulary of
32,000 take 1.04 GB in float32, and as much again for their gradient. A `lax.scan` over tiles of the
token axis computes and discards them. Tiling the token axis instead of the batch axis keeps sharded
batches in place.

  token_terms      terms of each token; the backward pass recomputes the logits: four logits-sized
                   matmuls
  weighted_sum     weighted sum of the terms, the training loss; the weights are known, so the
                   gradient is computed in the forward pass: three logits-sized matmuls

Numerics and performance:
  - Logits accumulate in float32 (`preferred_element_type`) in both passes. Rounding them to
    bfloat16 in one pass only gives errors of several percent in the recomputed softmax.
  - The softmax gradient is cast to the activation dtype before the two backward matmuls.
  - Labels are selected by a dense comparison, which shards over V; gather and scatter do not.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ov_losses.contexts import zeros

DEFAULT_TILE = 16  # token columns; 8 tiles for a caption of 127


class TokenTerms(NamedTuple):
  """Softmax terms of every token; [B,T] float32. All but `correct` are differentiable."""

  nll: jax.Array  # lse - logit of the label
  uniform_nll: jax.Array  # lse - mean logit: cross-entropy against the uniform distribution
  lse: jax.Array  # logsumexp of the logits
  correct: jax.Array  # 1 where the label has the strictly largest logit, else 0


def token_terms(
  hidden: jax.Array,  # [B,T,D] float32 or bfloat16
  head: jax.Array,  # [D,V]
  labels: jax.Array,  # [B,T] integer; clipped to [0, V)
  *,
  tile: int | None = None,
  batch_shards: int = 1,
) -> TokenTerms:
  """Return the softmax terms of `hidden @ head` with at most [B,tile,V] live logits.

  Args:
    hidden: hidden states; their dtype is the dtype of the matmuls.
    head: output matrix, cast to the dtype of `hidden`.
    labels: target ids.
    tile: maximum number of token columns per scan step; None means 16. Tiles have equal sizes to
      reduce padding: 20 tokens give 2 tiles of 10.
    batch_shards: number of devices that the batch is split over, a divisor of B. The gradient of
      the head is kept as partial sums [batch_shards,D,V] until the scan ends: one [D,V] per device
      and a single reduction.

  Raises:
    ValueError: if a shape or dtype is invalid.
  """
  _check(hidden, head, labels, tile, batch_shards)
  split = _tiles_of(labels.shape[1], tile)
  labels = jnp.clip(labels, 0, head.shape[1] - 1)
  terms = _terms(split(hidden), head, split(labels), batch_shards)
  return TokenTerms(*(_join(x)[:, : labels.shape[1]] for x in terms))


def weighted_sum(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  weights: jax.Array,  # [B,T] float32 >= 0
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  tile: int | None = None,
  batch_shards: int = 1,
) -> tuple[jax.Array, TokenTerms]:
  """Return sum(weights * ((1-a) nll + a uniform_nll + z lse^2)) and the terms.

  The gradients of `hidden` and `head` are computed in the forward pass, and the backward pass
  scales them. The weights and the returned terms have no gradient. The other arguments are those of
  `token_terms`.

  Raises:
    ValueError: if a shape or dtype is invalid.
  """
  _check(hidden, head, labels, tile, batch_shards)
  split = _tiles_of(labels.shape[1], tile)
  labels = jnp.clip(labels, 0, head.shape[1] - 1)
  total, terms = _sum(
    split(hidden), head, split(labels), split(weights), label_smoothing, z_loss, batch_shards
  )
  terms = jax.lax.stop_gradient(terms)
  return total, TokenTerms(*(_join(x)[:, : labels.shape[1]] for x in terms))


def _check(
  hidden: jax.Array, head: jax.Array, labels: jax.Array, tile: int | None, batch_shards: int
) -> None:
  if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[2] != head.shape[0]:
    raise ValueError(
      f"hidden has shape {hidden.shape} and head {head.shape}; expected [B,T,D] and [D,V]."
    )
  if labels.shape != hidden.shape[:2]:
    raise ValueError(f"labels has shape {labels.shape}; expected [B,T] = {hidden.shape[:2]}.")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels has dtype {labels.dtype}; expected an integer dtype.")
  if hidden.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"hidden has dtype {hidden.dtype}; expected float32 or bfloat16; cast it.")
  if not jnp.issubdtype(head.dtype, jnp.floating):
    raise ValueError(f"head has dtype {head.dtype}; expected a float dtype.")
  if head.shape[1] < 1:
    raise ValueError(f"head has shape {head.shape}; expected [D,V] with at least 1 token.")
  if tile is not None and tile < 1:
    raise ValueError(f"tile={tile}; expected at least 1 token column, or None for the default.")
  if batch_shards < 1 or hidden.shape[0] % batch_shards:
    raise ValueError(
      f"batch_shards={batch_shards} does not divide the batch of {hidden.shape[0]}; pass the "
      "number of devices the batch axis is split over, or 1."
    )


def _tiles_of(length: int, tile: int | None) -> Callable[[jax.Array], jax.Array]:
  """Return a function [B,T,...] -> [tiles,B,t,...] that pads the last tile with zeros."""
  num_tiles = max(1, math.ceil(length / (tile or DEFAULT_TILE)))
  padding = num_tiles * math.ceil(length / num_tiles) - length

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    columns = x.shape[1] // num_tiles
    return jnp.moveaxis(x.reshape(x.shape[0], num_tiles, columns, *x.shape[2:]), 1, 0)

  return split


def _join(x: jax.Array) -> jax.Array:
  """Join [tiles,B,t,...] -> [B,tiles*t,...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def _is_label(labels: jax.Array, vocab: int) -> jax.Array:
  return labels[..., None] == jnp.arange(vocab, dtype=labels.dtype)


class _Tile(NamedTuple):
  """Terms and softmax of one tile of tokens."""

  terms: TokenTerms  # each [B,t]
  probabilities: jax.Array  # [B,t,V] float32


def _tile(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> _Tile:
  logits = _logits(hidden, head)
  is_label = _is_label(labels, head.shape[1])
  best_other = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
  label_logit = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
  # Subtract the largest logit first: lse - logit would cancel for large logits.
  peak = jnp.maximum(best_other, label_logit)
  shifted = logits - peak[..., None]
  exponentials = jnp.exp(shifted)
  total = jnp.sum(exponentials, axis=-1)
  log_sum = jnp.log(total)
  terms = TokenTerms(
    nll=log_sum - (label_logit - peak),
    uniform_nll=log_sum - jnp.mean(shifted, axis=-1),
    lse=log_sum + peak,
    correct=(label_logit > best_other).astype(jnp.float32),
  )
  return _Tile(terms, exponentials * (1.0 / total)[..., None])


def _tile_gradients(
  hidden: jax.Array,  # [B,t,D]
  head: jax.Array,  # [D,V] in the dtype of hidden
  labels: jax.Array,  # [B,t]
  probabilities: jax.Array,  # [B,t,V]
  cotangents: TokenTerms,
  batch_shards: int,
) -> tuple[jax.Array, jax.Array]:
  """Return the gradient of hidden [B,t,D] and float32 partial sums [batch_shards,D,V] of the head.

  d logits = (g_nll + g_uniform + g_lse) softmax - g_nll [v = label] - g_uniform / V
  """
  g, vocab = cotangents, head.shape[1]
  dlogits = (
    (g.nll + g.uniform_nll + g.lse)[..., None] * probabilities
    - jnp.where(_is_label(labels, vocab), g.nll[..., None], 0.0)
    - g.uniform_nll[..., None] / vocab
  ).astype(hidden.dtype)
  hidden_grad = jnp.einsum("btv,dv->btd", dlogits, head, preferred_element_type=jnp.float32)
  rows = hidden.shape[0] // batch_shards
  head_grad = jnp.einsum(
    "gbtd,gbtv->gdv",
    hidden.reshape(batch_shards, rows, *hidden.shape[1:]),
    dlogits.reshape(batch_shards, rows, *dlogits.shape[1:]),
    preferred_element_type=jnp.float32,
  )
  return hidden_grad.astype(hidden.dtype), head_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _terms(
  hidden: jax.Array,  # [tiles,B,t,D]
  head: jax.Array,  # [D,V]
  labels: jax.Array,  # [tiles,B,t]
  batch_shards: int,
) -> TokenTerms:  # each [tiles,B,t]
  del batch_shards  # used by the backward pass only
  head = head.astype(hidden.dtype)

  def step(_: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, TokenTerms]:
    hidden_tile, label_tile = xs
    return None, _tile(hidden_tile, head, label_tile).terms

  return jax.lax.scan(step, None, (hidden, labels))[1]


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # hidden, head, labels, lse


def _terms_fwd(
  hidden: jax.Array, head: jax.Array, labels: jax.Array, batch_shards: int
) -> tuple[TokenTerms, Residuals]:
  terms = _terms(hidden, head, labels, batch_shards)
  return terms, (hidden, head, labels, terms.lse)


def _terms_bwd(
  batch_shards: int, residuals: Residuals, cotangents: TokenTerms
) -> tuple[jax.Array, jax.Array, None]:
  hidden, head, labels, lse = residuals
  weights = head.astype(hidden.dtype)

  def step(
    head_grad: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array, TokenTerms]
  ) -> tuple[jax.Array, jax.Array]:
    x, label, lse_tile, g = xs
    probabilities = jnp.exp(_logits(x, weights) - lse_tile[..., None])
    x_grad, of_tile = _tile_gradients(x, weights, label, probabilities, g, batch_shards)
    return head_grad + of_tile, x_grad

  start = zeros((batch_shards, *head.shape), like=hidden)
  head_grad, hidden_grad = jax.lax.scan(step, start, (hidden, labels, lse, cotangents))
  return hidden_grad, jnp.sum(head_grad, axis=0).astype(head.dtype), None


_terms.defvjp(_terms_fwd, _terms_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sum(
  hidden: jax.Array,  # [tiles,B,t,D]
  head: jax.Array,  # [D,V]
  labels: jax.Array,  # [tiles,B,t]
  weights: jax.Array,  # [tiles,B,t]
  label_smoothing: float,
  z_loss: float,
  batch_shards: int,
) -> tuple[jax.Array, TokenTerms]:
  terms = _terms(hidden, head, labels, batch_shards)
  return jnp.sum(_objective(terms, weights, label_smoothing, z_loss)), terms


def _objective(
  terms: TokenTerms, weights: jax.Array, label_smoothing: float, z_loss: float
) -> jax.Array:
  """Return the loss of each token; 0 where the weight is 0, even if a term is NaN."""
  value = (1.0 - label_smoothing) * terms.nll
  if label_smoothing:
    value += label_smoothing * terms.uniform_nll
  if z_loss:
    value += z_loss * jnp.square(terms.lse)
  return jnp.where(weights > 0, weights * value, 0.0)


def _sum_fwd(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  label_smoothing: float,
  z_loss: float,
  batch_shards: int,
) -> tuple[tuple[jax.Array, TokenTerms], tuple[jax.Array, jax.Array]]:
  matrix = head.astype(hidden.dtype)

  def step(
    head_grad: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, tuple[TokenTerms, jax.Array]]:
    x, label, weight = xs
    terms, probabilities = _tile(x, matrix, label)
    slopes = TokenTerms(
      nll=(1.0 - label_smoothing) * weight,
      uniform_nll=label_smoothing * weight,
      lse=2.0 * z_loss * terms.lse * weight,
      correct=weight,  # has no gradient
    )
    x_grad, of_tile = _tile_gradients(x, matrix, label, probabilities, slopes, batch_shards)
    return head_grad + of_tile, (terms, x_grad)

  start = zeros((batch_shards, *head.shape), like=hidden)
  head_grad, (terms, hidden_grad) = jax.lax.scan(step, start, (hidden, labels, weights))
  total = jnp.sum(_objective(terms, weights, label_smoothing, z_loss))
  return (total, terms), (hidden_grad, jnp.sum(head_grad, axis=0).astype(head.dtype))


def _sum_bwd(
  label_smoothing: float,
  z_loss: float,
  batch_shards: int,
  gradients: tuple[jax.Array, jax.Array],
  cotangents: tuple[jax.Array, TokenTerms],
) -> tuple[jax.Array, jax.Array, None, None]:
  del label_smoothing, z_loss, batch_shards
  slope, _ = cotangents  # the terms are wrapped in stop_gradient
  hidden_grad, head_grad = gradients
  scale = lambda x: (slope * x.astype(jnp.float32)).astype(x.dtype)
  return scale(hidden_grad), scale(head_grad), None, None


_sum.defvjp(_sum_fwd, _sum_bwd)
