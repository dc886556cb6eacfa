"""Gradient cache: exact gradients of contrastive batches that do not fit in memory.

A contrastive loss is not a sum over microbatches, but it depends on the parameters only through one
small embedding per row. The algorithm of Gao et al. 2021 (https://arxiv.org/abs/2101.06983):

  1. Embed every microbatch and keep only the embeddings.
  2. Compute the loss of all embeddings and its gradient with respect to each embedding.
  3. Embed every microbatch again and backpropagate its part of that gradient to the parameters.

The cost is a second forward pass of the encoders; only the activations of one microbatch are live
at a time. Per-row losses such as captioning are computed in step 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from einops import rearrange
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float, PRNGKeyArray

from ov_losses import contexts

PyTree = Any


class LossTerms(NamedTuple):
  """Loss, weight and metrics of a microbatch. Plain 3-tuples are accepted as well.

  Attributes:
    loss: float32 mean over `weight` units; finite if `weight` is 0.
    weight: float32 number of units, such as tokens or rows.
    metrics: float32 means over the same units.
  """

  loss: Float[Array, ""]
  weight: Float[Array, ""]
  metrics: dict[str, Float[Array, ""]]


Terms = tuple[jax.Array, jax.Array, dict[str, jax.Array]]
RowLosses = Terms | Sequence[Terms]


def gradient_cache(
  embed: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, RowLosses]],
  combine: Callable[[PyTree, PyTree], Terms],
  params: PyTree,
  batches: PyTree,
  key: PRNGKeyArray,
  *,
  shardings: PyTree | None = None,
) -> tuple[PyTree, LossTerms]:
  """Compute the gradient of a batch-level loss plus per-row losses over all microbatches.

    loss = combine.loss + sum_own sum_j own_j.weight * own_j.loss / sum_j own_j.weight

  The result equals the gradient of the full batch up to float32 rounding if `embed` treats rows
  independently. Random numbers that `embed` draws from its key differ from those of the full batch.

  Args:
    embed: function (params, microbatch [b,...], key) -> (rows, own). `rows` is a tree of arrays
      [b,...] for `combine`; integer and bool arrays have no gradient. `own` is the per-row loss of
      the microbatch, or a list of such losses, which may have different units.
    combine: function (params, rows [k*b,...]) -> batch-level loss. Row i*k + j is row i of
      microbatch j, so rows that are sharded over devices are not moved.
    params: parameters to differentiate with respect to.
    batches: tree of arrays [k,b,...].
    key: random key; microbatch j gets fold_in(key, j) in both passes.
    shardings: shardings of `params` for the float32 gradient sums; None leaves them to the
      compiler.

  Returns:
    The float32 gradients with the structure of `params`, and the total loss with the weight of
    `combine` and all metrics.

  Raises:
    ValueError: if `batches` has no arrays, no microbatch, or different numbers of microbatches.
  """
  k = _num_microbatches(batches)
  keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(k))

  def embed_pass(_: None, xs: tuple[PyTree, jax.Array]) -> tuple[None, tuple[PyTree, PyTree]]:
    rows, own = embed(params, *xs)
    return None, (rows, [terms[1] for terms in _as_list(own)])

  _, (rows, weights) = jax.lax.scan(embed_pass, None, (batches, keys))
  leaves, tree = jax.tree.flatten(jax.tree.map(_interleave, rows))
  floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]

  def batch_loss(params: PyTree, floats: list[jax.Array]) -> tuple[jax.Array, Terms]:
    given = iter(floats)
    merged = [next(given) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
    out = combine(params, jax.tree.unflatten(tree, merged))
    return out[0], out

  (params_grad, rows_grad), combined = jax.grad(batch_loss, (0, 1), has_aux=True)(params, floats)
  rows_grad = jax.tree.map(lambda x: _deinterleave(x, k), rows_grad)
  fractions = [w / jnp.where(w.sum() > 0, w.sum(), 1.0) for w in weights]

  def gradient_pass(sums: PyTree, xs: tuple) -> tuple[PyTree, Sequence[Terms]]:
    batch, key, rows_grad, fractions = xs

    def outputs(params: PyTree) -> tuple[tuple[list[jax.Array], list[jax.Array]], Sequence[Terms]]:
      rows, own = embed(params, batch, key)
      own = _as_list(own)
      floats = [x for x in jax.tree.leaves(rows) if jnp.issubdtype(x.dtype, jnp.inexact)]
      return (floats, [terms[0] + contexts.varying_zero(terms) for terms in own]), own

    (_, losses), pull, own = jax.vjp(outputs, params, has_aux=True)
    fractions = [
      (fraction + contexts.varying_zero(loss)).astype(loss.dtype)
      for fraction, loss in zip(fractions, losses, strict=True)
    ]
    (grads,) = pull((rows_grad, fractions))
    return _constrain(_add(sums, grads), shardings), own

  start = _constrain(jax.tree.map(lambda g: g.astype(jnp.float32), params_grad), shardings)
  grads, own = jax.lax.scan(gradient_pass, start, (batches, keys, rows_grad, fractions))
  loss, metrics = combined[0], dict(combined[2])
  for terms, fraction in zip(own, fractions, strict=True):
    mean = lambda x, fraction=fraction: jnp.sum(jnp.where(fraction > 0, fraction * x, 0.0))
    loss, metrics = loss + mean(terms[0]), metrics | jax.tree.map(mean, terms[2])
  return grads, LossTerms(loss, combined[1], metrics)


def _as_list(own: RowLosses) -> Sequence[Terms]:
  return own if isinstance(own, list) else [own]  # type: ignore[list-item]  # a single 3-tuple


def _num_microbatches(batches: PyTree) -> int:
  sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
  if len(sizes) != 1 or sizes & {(), (0,)}:
    raise ValueError(
      f"batches has arrays with leading dimensions {sorted(sizes)}; expected arrays [k,b,...] with "
      "the same k >= 1."
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
  return contexts.reshaped(x, lambda x: rearrange(x, "k b ... -> (b k) ..."), axis=0)


def _deinterleave(x: jax.Array, k: int) -> jax.Array:
  return contexts.reshaped(x, lambda x: rearrange(x, "(b k) ... -> k b ...", k=k), axis=1)
