"""Three implementations of the sums over negatives and their gradients.

  naive      materialises the matrix [K,B,B] and uses automatic gradients; the reference.
  gathered   each device all-gathers the texts and scans over chunks of its image rows.
  ring       texts stay sharded; each shard and its partial sums pass through all devices by
             `ppermute` and return after as many steps as there are devices.

Gathered and ring share one `custom_vjp` around two `shard_map`s. Collectives are not
differentiated, and the backward pass recomputes each block.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ov_losses import contexts
from ov_losses import similarity_blocks as blocks
from ov_losses.similarity_blocks import BackwardInputs, Embeddings, Kind, NegativeStats, RowStats

Form = Literal["naive", "gathered", "ring"]


class LossConfig(NamedTuple):
  """Static configuration of a loss.

  Attributes:
    axes: mesh axes that split the rows; () on one device.
  """

  kind: Kind
  form: Form
  mesh: Mesh | None
  axes: tuple[str, ...]
  chunk: int | None

  @property
  def devices(self) -> int:
    """Return the number of devices that the rows are split over."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1


class SimilarityStats(NamedTuple):
  """Statistics of the similarity matrix; [K,B] float32. The first three are differentiable.

  Attributes:
    positive: cosine of each image and its own text.
    row: reduction over the negatives of each image: logsumexp of the logits for softmax, sum of
      softplus(logit) for sigmoid.
    column: reduction over the negatives of each text; unused for sigmoid.
    best_row: largest logit among the negatives of each image.
    best_column: largest logit among the negatives of each text.
    cosines: sum of the cosines of the negatives of each image.
    num_negatives: number of negatives of each image.
  """

  positive: jax.Array
  row: jax.Array
  column: jax.Array
  best_row: jax.Array
  best_column: jax.Array
  cosines: jax.Array
  num_negatives: jax.Array


class Inputs(NamedTuple):
  """Array arguments of the losses: [B,E], [K,B,E], [], [], int32 [K or 1,B], bool [B]."""

  image: jax.Array
  texts: jax.Array
  scale: jax.Array
  bias: jax.Array
  groups: jax.Array
  valid: jax.Array


def similarity_stats(config: LossConfig, inputs: Inputs) -> SimilarityStats:
  """Compute the statistics of the global batch; B is a multiple of `config.devices`."""
  if config.form == "naive":
    return _naive(config.kind, inputs)
  return _blockwise(config, inputs)


def _naive(kind: Kind, inputs: Inputs) -> SimilarityStats:
  image, texts, scale, bias, groups, valid = inputs
  cosines = blocks.matmul(image, texts, "re,kce->krc")
  logits = scale * cosines + bias
  is_negative = blocks.negative_mask(
    Embeddings(image, groups, valid), Embeddings(texts, groups, valid)
  )
  masked = jnp.where(is_negative, logits, blocks.FLOOR)
  if kind == "softmax":
    row, column = (jax.nn.logsumexp(masked, axis) for axis in (2, 1))
  else:
    terms = jnp.where(is_negative, jax.nn.softplus(logits), 0.0)
    row, column = (jnp.sum(terms, axis) for axis in (2, 1))
  return SimilarityStats(
    positive=jnp.diagonal(cosines, axis1=1, axis2=2),
    row=row,
    column=column,
    best_row=jnp.max(masked, 2),
    best_column=jnp.max(masked, 1),
    cosines=jnp.sum(jnp.where(is_negative, cosines, 0.0), 2),
    num_negatives=jnp.sum(jnp.broadcast_to(is_negative, cosines.shape), 2, dtype=jnp.float32),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(config: LossConfig, inputs: Inputs) -> SimilarityStats:
  return _forward(config, inputs)[0]


Residuals = tuple[Inputs, jax.Array, jax.Array]  # inputs, lse of rows and columns [K,B]


def _forward(config: LossConfig, inputs: Inputs) -> tuple[SimilarityStats, Residuals]:
  def local(inputs: Inputs) -> SimilarityStats:
    image, texts = _embeddings(inputs)
    rows, column = _SUMS[config.form](config, image, texts, inputs.scale, inputs.bias)
    return SimilarityStats(
      positive=_positive(inputs.image, inputs.texts),
      row=blocks.finalize(config.kind, rows.stats),
      column=blocks.finalize(config.kind, column),
      best_row=rows.stats.best,
      best_column=column.best,
      cosines=rows.cosines,
      num_negatives=rows.num_negatives,
    )

  out = _on_devices(config, local, (_specs(config),), P(None, config.axes))(inputs)
  return out, (inputs, out.row, out.column)


def _backward(config: LossConfig, residuals: Residuals, g: SimilarityStats) -> tuple[Any]:
  inputs, row, column = residuals

  def local(
    inputs: Inputs, row: BackwardInputs, column: BackwardInputs, g_positive: jax.Array
  ) -> tuple:
    image, texts = _embeddings(inputs)
    image_grad, texts_grad, scale_grad, bias_grad = _GRADIENTS[config.form](
      config, image, row, texts, column, inputs.scale, inputs.bias
    )
    image_grad += jnp.einsum("kr,kre->re", g_positive, inputs.texts.astype(jnp.float32))
    texts_grad += g_positive[:, :, None] * inputs.image.astype(jnp.float32)
    dtype = inputs.image.dtype
    # Scale and bias gradients have one entry per device and are summed outside the shard_map.
    return image_grad.astype(dtype), texts_grad.astype(dtype), scale_grad[None], bias_grad[None]

  per_row, split = P(None, config.axes), P(config.axes)
  image_grad, texts_grad, scale_grad, bias_grad = _on_devices(
    config, local, (_specs(config), per_row, per_row, per_row), (split, per_row, split, split)
  )(inputs, BackwardInputs(row, g.row), BackwardInputs(column, g.column), g.positive)
  none: Any = None  # groups and valid are not differentiable
  return (Inputs(image_grad, texts_grad, scale_grad.sum(), bias_grad.sum(), none, none),)


_blockwise.defvjp(_forward, _backward)


def _specs(config: LossConfig) -> Any:
  """Return the partition specs of `Inputs`."""
  split: Any = P(config.axes)
  per_row: Any = P(None, config.axes)
  everywhere: Any = P()
  return Inputs(split, per_row, everywhere, everywhere, per_row, split)


def _on_devices(config: LossConfig, local: Callable, in_specs: tuple, out_specs: Any) -> Callable:
  if config.mesh is None or config.devices == 1:
    return local
  # check_vma is only needed for derivatives through the map.
  return jax.shard_map(
    local,
    mesh=contexts.automatic_mesh(config.mesh),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )


def _embeddings(inputs: Inputs) -> tuple[Embeddings, Embeddings]:
  return (
    Embeddings(inputs.image, inputs.groups, inputs.valid),
    Embeddings(inputs.texts, inputs.groups, inputs.valid),
  )


def _positive(image: jax.Array, texts: jax.Array) -> jax.Array:
  """Return the float32 cosines [K,R] of the positive pairs."""
  return jnp.sum(image.astype(jnp.float32) * texts.astype(jnp.float32), axis=-1)


def _gather(config: LossConfig, x: Any, axis: int) -> Any:
  """All-gather every leaf, [..,R,..] -> [..,B,..]."""
  if config.devices == 1:
    return x
  return jax.tree.map(lambda a: jax.lax.all_gather(a, config.axes, axis=axis, tiled=True), x)


def _gather_rows(config: LossConfig, rows: Embeddings) -> Embeddings:
  """All-gather texts, [K,R,E] -> [K,B,E]."""
  x, groups = _gather(config, (rows.x, rows.groups), 1)
  return Embeddings(x, groups, _gather(config, rows.valid, 0))


def _gathered_sums(
  config: LossConfig, image: Embeddings, texts: Embeddings, scale: jax.Array, bias: jax.Array
) -> tuple[RowStats, NegativeStats]:
  all_texts = _gather_rows(config, texts)
  rows, column = blocks.sums(config.kind, image, all_texts, scale, bias, config.chunk)
  if config.devices == 1:
    return rows, column
  best = jax.lax.pmax(column.best, config.axes)
  total = column.total
  if config.kind == "softmax":
    total *= jnp.exp(column.best - best)
  total = jax.lax.psum_scatter(total, config.axes, scatter_dimension=1, tiled=True)
  first = jax.lax.axis_index(config.axes) * total.shape[1]
  return rows, NegativeStats(jax.lax.dynamic_slice_in_dim(best, first, total.shape[1], 1), total)


def _gathered_gradients(
  config: LossConfig,
  image: Embeddings,
  image_back: BackwardInputs,
  texts: Embeddings,
  texts_back: BackwardInputs,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  all_texts, all_texts_back = _gather_rows(config, texts), _gather(config, texts_back, 1)
  image_grad, texts_grad, *rest = blocks.gradients(
    config.kind, image, image_back, all_texts, all_texts_back, scale, bias, config.chunk
  )
  if config.devices > 1:
    texts_grad = jax.lax.psum_scatter(texts_grad, config.axes, scatter_dimension=1, tiled=True)
  return image_grad, texts_grad, rest[0], rest[1]


def _next_device(config: LossConfig, x: Any) -> Any:
  """Pass every leaf to the next device of the ring."""
  if config.devices == 1:
    return x
  hops = [(i, (i + 1) % config.devices) for i in range(config.devices)]
  return jax.tree.map(lambda a: jax.lax.ppermute(a, config.axes, hops), x)


def _ring_sums(
  config: LossConfig, image: Embeddings, texts: Embeddings, scale: jax.Array, bias: jax.Array
) -> tuple[RowStats, NegativeStats]:
  empty = blocks.empty_stats(texts.x[:, :, 0])
  zeros = contexts.zeros(empty.best.shape, texts.x)

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    remote_texts, column, seen = carry
    found, found_column = blocks.sums(config.kind, image, remote_texts, scale, bias, config.chunk)
    column = blocks.merge_stats(config.kind, column, found_column)
    seen = RowStats(
      blocks.merge_stats(config.kind, seen.stats, found.stats),
      seen.cosines + found.cosines,
      seen.num_negatives + found.num_negatives,
    )
    return (*_next_device(config, (remote_texts, column)), seen), None

  start = (texts, empty, RowStats(empty, zeros, zeros))
  (_, column, rows), _ = jax.lax.scan(step, start, length=config.devices)
  return rows, column


def _ring_gradients(
  config: LossConfig,
  image: Embeddings,
  image_back: BackwardInputs,
  texts: Embeddings,
  texts_back: BackwardInputs,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  zero = contexts.zeros((), texts.x)
  zeros = [contexts.zeros(rows.x.shape, texts.x) for rows in (image, texts)]

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    remote_texts, back, texts_grad, image_grad, scale_grad, bias_grad = carry
    found = blocks.gradients(
      config.kind, image, image_back, remote_texts, back, scale, bias, config.chunk
    )
    home = _next_device(config, (remote_texts, back, texts_grad + found[1]))
    return (*home, image_grad + found[0], scale_grad + found[2], bias_grad + found[3]), None

  start = (texts, texts_back, zeros[1], zeros[0], zero, zero)
  (_, _, texts_grad, *rest), _ = jax.lax.scan(step, start, length=config.devices)
  return rest[0], texts_grad, rest[1], rest[2]


_SUMS = {"gathered": _gathered_sums, "ring": _ring_sums}
_GRADIENTS = {"gathered": _gathered_gradients, "ring": _ring_gradients}
