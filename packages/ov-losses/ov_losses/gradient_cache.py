"""Exact gradients of a contrastive batch that does not fit in memory, in two passes.

A contrastive loss is no sum over microbatches: every row meets every other. But it depends on the
parameters through one small embedding per row. So (Gao et al. 2021,
https://arxiv.org/abs/2101.06983):

  1. embed every microbatch and keep only the embeddings;
  2. take the loss of all of them together, and its gradient with respect to each;
  3. embed every microbatch again, and pull its part of that gradient back to the parameters.

The price is a second forward pass of what makes the embeddings; the activations of one microbatch
are alive at a time. Losses that rows have on their own (captions) ride along in pass 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ov_losses import contexts

PyTree = Any


class LossTerms(NamedTuple):
  """Any three of this form will do, also as a plain tuple.

  Attributes:
    loss: float32 [], a mean over `weight` units.
    weight: float32 [], how many units that is; 0 if there were none, with a finite loss.
    metrics: name -> float32 [], means over the same units.
  """

  loss: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]


Terms = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def gradient_cache(
  embed: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, Terms]],
  combine: Callable[[PyTree, PyTree], Terms],
  params: PyTree,
  batches: PyTree,
  key: jax.Array,
  *,
  shardings: PyTree | None = None,
) -> tuple[PyTree, LossTerms]:
  """Gradient of `combine` over the rows of all microbatches, plus the mean of their own losses.

    loss = combine.loss + sum_j own_j.weight * own_j.loss / sum_j own_j.weight

  It equals the gradient of the whole batch at once up to float32 rounding, if `embed` treats rows
  independently; draws it makes from its key differ.

  Args:
    embed: (params, microbatch [b,...], key) -> (rows, own): a tree of arrays [b,...] for `combine`,
      of which whole numbers and bools have no gradient, and the loss that rows have on their own.
    combine: (params, rows [k*b,...]) -> the loss of all rows together. Row i*k + j is row i of
      microbatch j, so rows that are split over devices stay where they are.
    params: what to differentiate by.
    batches: tree of arrays [k,b,...].
    key: microbatch j is given fold_in(key, j), in both passes.
    shardings: of `params`, for the float32 sums of the gradients; None leaves them to the compiler.

  Returns:
    Gradients in float32, shaped like `params`; and the loss with the weight of `combine`, and the
    metrics of both.

  Raises:
    ValueError: `batches` has no arrays, no microbatch, or arrays of different numbers of them.
  """
  k = _num_microbatches(batches)
  keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(k))

  def first(_: None, xs: tuple[PyTree, jax.Array]) -> tuple[None, tuple[PyTree, jax.Array]]:
    rows, own = embed(params, *xs)
    return None, (rows, own[1])  # own loss and metrics are dead code here

  _, (rows, weights) = jax.lax.scan(first, None, (batches, keys))
  leaves, tree = jax.tree.flatten(jax.tree.map(_interleave, rows))
  floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]

  def together(params: PyTree, floats: list[jax.Array]) -> tuple[jax.Array, Terms]:
    given = iter(floats)
    merged = [next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
    out = combine(params, jax.tree.unflatten(tree, merged))
    return out[0], out

  (params_grad, rows_grad), combined = jax.grad(together, (0, 1), has_aux=True)(params, floats)
  rows_grad = jax.tree.map(lambda x: _deinterleave(x, k), rows_grad)
  shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1.0)

  def second(sums: PyTree, xs: tuple) -> tuple[PyTree, Terms]:
    batch, key, rows_grad, share = xs

    def outputs(params: PyTree) -> tuple[tuple[list[jax.Array], jax.Array], Terms]:
      rows, own = embed(params, batch, key)
      floats = [x for x in jax.tree.leaves(rows) if jnp.issubdtype(x.dtype, jnp.inexact)]
      return (floats, own[0] + contexts.varying_zero(own)), own

    (_, loss), pull, own = jax.vjp(outputs, params, has_aux=True)
    share = share + contexts.varying_zero(loss)
    (grads,) = pull((rows_grad, share.astype(loss.dtype)))
    return _constrain(_add(sums, grads), shardings), own

  start = _constrain(jax.tree.map(lambda g: g.astype(jnp.float32), params_grad), shardings)
  grads, own = jax.lax.scan(second, start, (batches, keys, rows_grad, shares))
  mean = lambda x: jnp.sum(jnp.where(shares > 0, shares * x, 0.0))
  metrics = {**combined[2], **jax.tree.map(mean, own[2])}
  return grads, LossTerms(combined[0] + mean(own[0]), combined[1], metrics)


def _num_microbatches(batches: PyTree) -> int:
  sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
  if len(sizes) != 1 or sizes & {(), (0,)}:
    raise ValueError(
      f"batches has arrays with leading dimensions {sorted(sizes)}; expected arrays [k,b,...] with "
      "one k of at least 1 microbatch."
    )
  return sizes.pop()[0]


def _add(sums: PyTree, grads: PyTree) -> PyTree:
  return jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, grads)


def _constrain(grads: PyTree, shardings: PyTree | None) -> PyTree:
  if shardings is None:
    return grads
  meshes = [getattr(s, "mesh", None) for s in jax.tree.leaves(shardings)]
  if any(mesh is not None and AxisType.Explicit in mesh.axis_types for mesh in meshes):
    return jax.sharding.reshard(grads, shardings)
  return jax.lax.with_sharding_constraint(grads, shardings)


def _interleave(x: jax.Array) -> jax.Array:
  """[k,b,...] -> [b*k,...]."""
  k, b, *rest = x.shape
  return contexts.reshaped(x, lambda x: x.swapaxes(0, 1).reshape(b * k, *rest), axis=0)


def _deinterleave(x: jax.Array, k: int) -> jax.Array:
  """[b*k,...] -> [k,b,...]."""
  rows, *rest = x.shape
  return contexts.reshaped(x, lambda x: x.reshape(rows // k, k, *rest).swapaxes(0, 1), axis=1)
