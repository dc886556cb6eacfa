"""Sums over the negatives of a similarity matrix, one block of rows at a time.

  cos_kij = <image_i, text_kj>            logit_kij = scale * cos_kij + bias
  (k,i,j) is a negative if both rows are valid and group_ki != group_kj; the diagonal never is.

A `lax.scan` over chunks of the image rows computes a block [K,chunk,C] of the matrix, reduces it
along rows and columns, and discards it; `gradients` recomputes it. All functions work on the arrays
of one device; `similarity_forms` moves arrays between devices.

As in `tiles`, matmuls accumulate in float32, and the gradient of the logits is rounded to the dtype
of the rows before the two backward matmuls; nothing else is rounded.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ov_losses.contexts import zeros

Kind = Literal["softmax", "sigmoid"]

BLOCK_SIZE = 2**22  # default number of elements of a block: 16 MiB of float32
FLOOR = -1e30  # logit of masked pairs; finite, because inf - inf is NaN


class Embeddings(NamedTuple):
  """Embeddings of one modality, and the arrays that determine which pairs are negatives."""

  x: jax.Array  # [R,E] images or [K,C,E] texts, float32 or bfloat16
  groups: jax.Array  # [K,R] or [1,R] int32; rows of equal groups are not negatives
  valid: jax.Array  # [R] bool


class NegativeStats(NamedTuple):
  """Reduction over the negatives of each row (or column); [K,R] float32.

  Attributes:
    best: largest logit; `FLOOR` without negatives.
    total: softmax: sum of exp(logit - best); sigmoid: sum of softplus(logit).
  """

  best: jax.Array
  total: jax.Array


class RowStats(NamedTuple):
  """Statistics of the negatives of each image row; [K,R] float32."""

  stats: NegativeStats
  cosines: jax.Array  # sum of the cosines of the negatives
  num_negatives: jax.Array


class BackwardInputs(NamedTuple):
  """Residuals and cotangents of one modality for the backward pass; [K,R] float32."""

  lse: jax.Array  # logsumexp of the negatives; unused by sigmoid
  g: jax.Array  # cotangent of lse, or of the sum of softplus(logit)


def matmul(a: jax.Array, b: jax.Array, pattern: str) -> jax.Array:
  """Return an einsum with float32 accumulation; float32 inputs use the highest precision."""
  return jnp.einsum(
    pattern,
    a,
    b,
    preferred_element_type=jnp.float32,
    precision="highest" if a.dtype == jnp.float32 else None,
  )


def negative_mask(rows: Embeddings, columns: Embeddings) -> jax.Array:
  """Return the bool [K,R,C] mask of negative pairs."""
  other = rows.groups[:, :, None] != columns.groups[:, None, :]
  return other & rows.valid[:, None] & columns.valid


def reduce(kind: Kind, logits: jax.Array, is_negative: jax.Array, axis: int) -> NegativeStats:
  """Reduce a block along `axis`."""
  best = jnp.max(jnp.where(is_negative, logits, FLOOR), axis)
  if kind == "softmax":
    terms = jnp.exp(logits - jnp.expand_dims(best, axis))
  else:
    terms = jax.nn.softplus(logits)
  return NegativeStats(best, jnp.sum(jnp.where(is_negative, terms, 0.0), axis))


def empty_stats(like: jax.Array) -> NegativeStats:
  """Return the reduction over zero negatives, with the shape of `like`."""
  empty = zeros(like.shape, like)
  return NegativeStats(empty + FLOOR, empty)


def merge_stats(kind: Kind, a: NegativeStats, b: NegativeStats) -> NegativeStats:
  """Combine the reductions over two disjoint sets of negatives."""
  if kind == "sigmoid":
    return NegativeStats(jnp.maximum(a.best, b.best), a.total + b.total)
  best = jnp.maximum(a.best, b.best)
  return NegativeStats(best, a.total * jnp.exp(a.best - best) + b.total * jnp.exp(b.best - best))


def finalize(kind: Kind, stats: NegativeStats) -> jax.Array:
  """Return the logsumexp (softmax; `FLOOR` without negatives) or the sum (sigmoid)."""
  if kind == "sigmoid":
    return stats.total
  some = stats.total > 0
  return jnp.where(some, stats.best + jnp.log(jnp.where(some, stats.total, 1.0)), FLOOR)


def sums(
  kind: Kind,
  image: Embeddings,
  texts: Embeddings,
  scale: jax.Array,
  bias: jax.Array,
  chunk: int | None,
) -> tuple[RowStats, NegativeStats]:
  """Reduce over the negatives of R images among C texts, and of the texts among the images.

  Returns:
    The [K,R] statistics of the images, and the [K,C] reduction of the texts.
  """
  num_rows = image.x.shape[0]

  def step(columns: NegativeStats, rows: Embeddings) -> tuple[NegativeStats, RowStats]:
    cosines = matmul(rows.x, texts.x, "re,kce->krc")
    is_negative = negative_mask(rows, texts)
    logits = scale * cosines + bias
    columns = merge_stats(kind, columns, reduce(kind, logits, is_negative, axis=1))
    out = RowStats(
      reduce(kind, logits, is_negative, axis=2),
      jnp.sum(jnp.where(is_negative, cosines, 0.0), axis=2),
      jnp.sum(jnp.broadcast_to(is_negative, cosines.shape), axis=2, dtype=jnp.float32),
    )
    return columns, out

  chunks = num_chunks(num_rows, texts.x.shape[0] * texts.x.shape[1], chunk)
  columns, out = jax.lax.scan(step, empty_stats(texts.x[:, :, 0]), _split_rows(image, chunks))
  return jax.tree.map(lambda x: _join(x, num_rows), out), columns


def gradients(
  kind: Kind,
  image: Embeddings,
  image_back: BackwardInputs,
  texts: Embeddings,
  texts_back: BackwardInputs,
  scale: jax.Array,
  bias: jax.Array,
  chunk: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Return the float32 gradients of images [R,E], texts [K,C,E], scale and bias.

  d logit_ij = g_i exp(logit_ij - lse_i) + g_j exp(logit_ij - lse_j), or g_i sigmoid(logit_ij).
  """
  num_rows, dtype = image.x.shape[0], image.x.dtype
  zero = zeros((), image.x)
  start = (zeros(texts.x.shape, image.x), zero, zero)

  def step(carry: tuple, xs: tuple[Embeddings, BackwardInputs]) -> tuple[tuple, jax.Array]:
    texts_grad, scale_grad, bias_grad = carry
    rows, back = xs
    cosines = matmul(rows.x, texts.x, "re,kce->krc")
    logits = scale * cosines + bias
    if kind == "softmax":
      dlogits = back.g[:, :, None] * jnp.exp(logits - back.lse[:, :, None])
      dlogits += texts_back.g[:, None, :] * jnp.exp(logits - texts_back.lse[:, None, :])
    else:
      dlogits = back.g[:, :, None] * jax.nn.sigmoid(logits)
    dlogits = jnp.where(negative_mask(rows, texts), dlogits, 0.0)
    dcosines = (scale * dlogits).astype(dtype)
    texts_grad += matmul(dcosines, rows.x, "krc,re->kce")
    scale_grad += jnp.sum(dlogits * cosines)
    bias_grad += jnp.sum(dlogits)
    return (texts_grad, scale_grad, bias_grad), matmul(dcosines, texts.x, "krc,kce->re")

  chunks = num_chunks(num_rows, texts.x.shape[0] * texts.x.shape[1], chunk)
  xs = (_split_rows(image, chunks), jax.tree.map(lambda x: _split(x, chunks), image_back))
  (texts_grad, scale_grad, bias_grad), image_grad = jax.lax.scan(step, start, xs)
  return image_grad.reshape(-1, image.x.shape[1])[:num_rows], texts_grad, scale_grad, bias_grad


def num_chunks(num_rows: int, columns: int, chunk: int | None) -> int:
  """Return the number of equal chunks of the rows, for `columns` = K*C elements per row."""
  largest = max(8, BLOCK_SIZE // columns) if chunk is None else chunk
  return max(1, -(-num_rows // largest))


def _split_rows(rows: Embeddings, chunks: int) -> Embeddings:
  """Split rows [R,...] -> [chunks,r,...]; padding is invalid."""
  x = _pad(rows.x, chunks, axis=0)
  valid = _pad(rows.valid, chunks, axis=0)
  return Embeddings(
    x.reshape(chunks, -1, x.shape[1]), _split(rows.groups, chunks), valid.reshape(chunks, -1)
  )


def _split(x: jax.Array, chunks: int) -> jax.Array:
  """Split [K,R] -> [chunks,K,r]."""
  x = _pad(x, chunks, axis=1)
  return x.reshape(x.shape[0], chunks, -1).swapaxes(0, 1)


def _join(x: jax.Array, num_rows: int) -> jax.Array:
  """Join [chunks,K,r] -> [K,R]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :num_rows]


def _pad(x: jax.Array, chunks: int, axis: int) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % chunks)
  return jnp.pad(x, widths)
