"""Sums over the negatives of a similarity matrix, one block of rows at a time.

  cos_kij = <image_i, text_kj>            logit_kij = scale * cos_kij + bias
  negatives of (k,i,j): both rows valid and group_ki != group_kj; the diagonal is never one.

A `lax.scan` over chunks of the image rows makes a block [K,chunk,C] of the matrix, reduces it along
its rows and along its columns, and drops it; `gradients` makes it again. Everything here works on
the arrays of one device; `similarity_forms` moves them between devices.

Three rules, as in `tiles`: products accumulate in float32; the gradient of the logits is rounded to
the dtype of the rows before the two backward products; nothing else is rounded.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ov_losses.contexts import zeros

Kind = Literal["softmax", "sigmoid"]

BLOCK_SIZE = 2**22  # entries of a block by default: 16 MiB of float32
FLOOR = -1e30  # a logit below every other; finite, so that no difference of two is not a number


class Rows(NamedTuple):
  """One side's embeddings and what decides which pairs are negatives."""

  x: jax.Array  # [R,E] images or [K,C,E] texts, float32 or bfloat16
  groups: jax.Array  # [K,R] or [1,R] int32; pairs of one group are no negatives
  valid: jax.Array  # [R] bool


class Side(NamedTuple):
  """Sums over the negatives of each row (or column), each [K,R] float32.

  Attributes:
    best: largest logit, `FLOOR` where there is no negative.
    total: softmax: sum of exp(logit - best); sigmoid: sum of softplus(logit).
  """

  best: jax.Array
  total: jax.Array


class Sums(NamedTuple):
  """What the image rows keep, each [K,R] float32."""

  side: Side
  cosines: jax.Array  # sum of the cosines of the negatives
  number: jax.Array  # of negatives


class Back(NamedTuple):
  """What the backward pass needs of each row of one side, [K,R] float32."""

  lse: jax.Array  # logarithm of the sum of exp(logit); unused by sigmoid
  g: jax.Array  # cotangent of that, or of the sum of softplus(logit)


def products(a: jax.Array, b: jax.Array, pattern: str) -> jax.Array:
  """einsum with a float32 result; float32 operands are not rounded on any device."""
  return jnp.einsum(
    pattern,
    a,
    b,
    preferred_element_type=jnp.float32,
    precision="highest" if a.dtype == jnp.float32 else None,
  )


def negatives(rows: Rows, columns: Rows) -> jax.Array:
  """bool [K,R,C]: which pairs are negatives."""
  other = rows.groups[:, :, None] != columns.groups[:, None, :]
  return other & rows.valid[:, None] & columns.valid


def reduce(kind: Kind, logits: jax.Array, keep: jax.Array, axis: int) -> Side:
  """The `Side` of a block along `axis`."""
  best = jnp.max(jnp.where(keep, logits, FLOOR), axis)
  if kind == "softmax":
    terms = jnp.exp(logits - jnp.expand_dims(best, axis))
  else:
    terms = jax.nn.softplus(logits)
  return Side(best, jnp.sum(jnp.where(keep, terms, 0.0), axis))


def empty_side(like: jax.Array) -> Side:
  """The `Side` of no negatives, in the shape of `like`."""
  empty = zeros(like.shape, like)
  return Side(empty + FLOOR, empty)


def merge(kind: Kind, a: Side, b: Side) -> Side:
  """The `Side` over the negatives of both."""
  if kind == "sigmoid":
    return Side(jnp.maximum(a.best, b.best), a.total + b.total)
  best = jnp.maximum(a.best, b.best)
  return Side(best, a.total * jnp.exp(a.best - best) + b.total * jnp.exp(b.best - best))


def finish(kind: Kind, side: Side) -> jax.Array:
  """softmax: the logarithm of the sum of exp(logit), `FLOOR` of none; sigmoid: the sum."""
  if kind == "sigmoid":
    return side.total
  some = side.total > 0
  return jnp.where(some, side.best + jnp.log(jnp.where(some, side.total, 1.0)), FLOOR)


def sums(
  kind: Kind,
  image: Rows,
  texts: Rows,
  scale: jax.Array,
  bias: jax.Array,
  chunk: int | None,
) -> tuple[Sums, Side]:
  """Sums over the negatives of R images among C texts, and of the texts among the images.

  Returns:
    `Sums` with [K,R] arrays of the images, and the `Side` with [K,C] arrays of the texts.
  """
  num_rows = image.x.shape[0]

  def step(columns: Side, rows: Rows) -> tuple[Side, Sums]:
    cosines = products(rows.x, texts.x, "re,kce->krc")
    keep = negatives(rows, texts)
    logits = scale * cosines + bias
    columns = merge(kind, columns, reduce(kind, logits, keep, axis=1))
    out = Sums(
      reduce(kind, logits, keep, axis=2),
      jnp.sum(jnp.where(keep, cosines, 0.0), axis=2),
      jnp.sum(jnp.broadcast_to(keep, cosines.shape), axis=2, dtype=jnp.float32),
    )
    return columns, out

  chunks = num_chunks(num_rows, texts.x.shape[0] * texts.x.shape[1], chunk)
  columns, out = jax.lax.scan(step, empty_side(texts.x[:, :, 0]), _split_rows(image, chunks))
  return jax.tree.map(lambda x: _join(x, num_rows), out), columns


def gradients(
  kind: Kind,
  image: Rows,
  image_back: Back,
  texts: Rows,
  texts_back: Back,
  scale: jax.Array,
  bias: jax.Array,
  chunk: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients through the sums over negatives: images [R,E], texts [K,C,E], scale, bias; float32.

  d logit_ij = g_i exp(logit_ij - lse_i) + g_j exp(logit_ij - lse_j), or g_i sigmoid(logit_ij).
  """
  num_rows, dtype = image.x.shape[0], image.x.dtype
  zero = zeros((), image.x)
  start = (zeros(texts.x.shape, image.x), zero, zero)

  def step(carry: tuple, xs: tuple[Rows, Back]) -> tuple[tuple, jax.Array]:
    texts_grad, scale_grad, bias_grad = carry
    rows, back = xs
    cosines = products(rows.x, texts.x, "re,kce->krc")
    logits = scale * cosines + bias
    if kind == "softmax":
      dlogits = back.g[:, :, None] * jnp.exp(logits - back.lse[:, :, None])
      dlogits += texts_back.g[:, None, :] * jnp.exp(logits - texts_back.lse[:, None, :])
    else:
      dlogits = back.g[:, :, None] * jax.nn.sigmoid(logits)
    dlogits = jnp.where(negatives(rows, texts), dlogits, 0.0)
    dcosines = (scale * dlogits).astype(dtype)
    texts_grad += products(dcosines, rows.x, "krc,re->kce")
    scale_grad += jnp.sum(dlogits * cosines)
    bias_grad += jnp.sum(dlogits)
    return (texts_grad, scale_grad, bias_grad), products(dcosines, texts.x, "krc,kce->re")

  chunks = num_chunks(num_rows, texts.x.shape[0] * texts.x.shape[1], chunk)
  xs = (_split_rows(image, chunks), jax.tree.map(lambda x: _split(x, chunks), image_back))
  (texts_grad, scale_grad, bias_grad), image_grad = jax.lax.scan(step, start, xs)
  return image_grad.reshape(-1, image.x.shape[1])[:num_rows], texts_grad, scale_grad, bias_grad


def num_chunks(num_rows: int, columns: int, chunk: int | None) -> int:
  """How many equal chunks the rows are cut into, for `columns` = K*C entries per row."""
  largest = max(8, BLOCK_SIZE // columns) if chunk is None else chunk
  return max(1, -(-num_rows // largest))


def _split_rows(rows: Rows, chunks: int) -> Rows:
  """Rows of [R,...] -> [chunks,r,...]; the padding is not valid."""
  x = _pad(rows.x, chunks, axis=0)
  valid = _pad(rows.valid, chunks, axis=0)
  return Rows(
    x.reshape(chunks, -1, x.shape[1]), _split(rows.groups, chunks), valid.reshape(chunks, -1)
  )


def _split(x: jax.Array, chunks: int) -> jax.Array:
  """[K,R] -> [chunks,K,r]."""
  x = _pad(x, chunks, axis=1)
  return x.reshape(x.shape[0], chunks, -1).swapaxes(0, 1)


def _join(x: jax.Array, num_rows: int) -> jax.Array:
  """[chunks,K,r] -> [K,R]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :num_rows]


def _pad(x: jax.Array, chunks: int, axis: int) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % chunks)
  return jnp.pad(x, widths)
