"""The sums over negatives in three forms: naive, gathered and ring; and their gradients.

  naive      the whole matrix [K,B,B] and automatic gradients: the yardstick.
  gathered   each device gathers all texts and scans over chunks of its own image rows.
  ring       the texts stay split: those of each device visit all devices in turn, together with
             what was summed for them, and come home after as many hops as there are devices.

Gathered and ring are one `custom_vjp` around two `shard_map`s: no derivative is taken through a
collective, and the backward pass makes each block again instead of keeping it.
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
from ov_losses.similarity_blocks import Back, Kind, Rows, Side, Sums

Form = Literal["naive", "gathered", "ring"]


class Plan(NamedTuple):
  """How the sums are made; hashable, fixed at tracing.

  Attributes:
    axes: mesh axes that the rows are split over; () on one device.
  """

  kind: Kind
  form: Form
  mesh: Mesh | None
  axes: tuple[str, ...]
  chunk: int | None

  @property
  def devices(self) -> int:
    """Parts that the rows are split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1


class Pairs(NamedTuple):
  """What the losses and metrics are made of, each [K,B] float32; the first three have gradients.

  Attributes:
    positive: cosine of each image and its own text.
    row: over the texts that are negatives of each image: the logarithm of the sum of exp(logit)
      for softmax, the sum of softplus(logit) for sigmoid.
    column: the same over the images that are negatives of each text; for sigmoid unused.
    best_row: largest logit among the negatives of each image.
    best_column: largest logit among the negatives of each text.
    cosines: sum of the cosines of the negatives of each image.
    number: how many negatives each image has.
  """

  positive: jax.Array
  row: jax.Array
  column: jax.Array
  best_row: jax.Array
  best_column: jax.Array
  cosines: jax.Array
  number: jax.Array


class Inputs(NamedTuple):
  """Arguments of the sums: [B,E], [K,B,E], [], [], int32 [K or 1,B], bool [B]."""

  image: jax.Array
  texts: jax.Array
  scale: jax.Array
  bias: jax.Array
  groups: jax.Array
  valid: jax.Array


def pairs(plan: Plan, inputs: Inputs) -> Pairs:
  """All sums over the global batch; B is a multiple of `plan.devices`."""
  if plan.form == "naive":
    return _naive(plan.kind, inputs)
  return _blockwise(plan, inputs)


def _naive(kind: Kind, inputs: Inputs) -> Pairs:
  image, texts, scale, bias, groups, valid = inputs
  cosines = blocks.products(image, texts, "re,kce->krc")
  logits = scale * cosines + bias
  keep = blocks.negatives(Rows(image, groups, valid), Rows(texts, groups, valid))
  masked = jnp.where(keep, logits, blocks.FLOOR)
  if kind == "softmax":
    row, column = (jax.nn.logsumexp(masked, axis) for axis in (2, 1))
  else:
    terms = jnp.where(keep, jax.nn.softplus(logits), 0.0)
    row, column = (jnp.sum(terms, axis) for axis in (2, 1))
  return Pairs(
    positive=jnp.diagonal(cosines, axis1=1, axis2=2),
    row=row,
    column=column,
    best_row=jnp.max(masked, 2),
    best_column=jnp.max(masked, 1),
    cosines=jnp.sum(jnp.where(keep, cosines, 0.0), 2),
    number=jnp.sum(jnp.broadcast_to(keep, cosines.shape), 2, dtype=jnp.float32),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(plan: Plan, inputs: Inputs) -> Pairs:
  return _forward(plan, inputs)[0]


Residuals = tuple[Inputs, jax.Array, jax.Array]  # and lse of rows and columns, [K,B]


def _forward(plan: Plan, inputs: Inputs) -> tuple[Pairs, Residuals]:
  def local(inputs: Inputs) -> Pairs:
    image, texts = _both(inputs)
    rows, column = _SUMS[plan.form](plan, image, texts, inputs.scale, inputs.bias)
    return Pairs(
      positive=_positive(inputs.image, inputs.texts),
      row=blocks.finish(plan.kind, rows.side),
      column=blocks.finish(plan.kind, column),
      best_row=rows.side.best,
      best_column=column.best,
      cosines=rows.cosines,
      number=rows.number,
    )

  out = _on_devices(plan, local, (_specs(plan),), P(None, plan.axes))(inputs)
  return out, (inputs, out.row, out.column)


def _backward(plan: Plan, residuals: Residuals, g: Pairs) -> tuple[Any]:
  inputs, row, column = residuals

  def local(inputs: Inputs, row: Back, column: Back, g_positive: jax.Array) -> tuple:
    image, texts = _both(inputs)
    image_grad, texts_grad, scale_grad, bias_grad = _GRADIENTS[plan.form](
      plan, image, row, texts, column, inputs.scale, inputs.bias
    )
    image_grad += jnp.einsum("kr,kre->re", g_positive, inputs.texts.astype(jnp.float32))
    texts_grad += g_positive[:, :, None] * inputs.image.astype(jnp.float32)
    dtype = inputs.image.dtype
    # One entry per device, summed outside: what leaves the map is split over it.
    return image_grad.astype(dtype), texts_grad.astype(dtype), scale_grad[None], bias_grad[None]

  per_row, split = P(None, plan.axes), P(plan.axes)
  image_grad, texts_grad, scale_grad, bias_grad = _on_devices(
    plan, local, (_specs(plan), per_row, per_row, per_row), (split, per_row, split, split)
  )(inputs, Back(row, g.row), Back(column, g.column), g.positive)
  none: Any = None  # numbers of groups and valid are not differentiated
  return (Inputs(image_grad, texts_grad, scale_grad.sum(), bias_grad.sum(), none, none),)


_blockwise.defvjp(_forward, _backward)


def _specs(plan: Plan) -> Any:
  """How `Inputs` are split over the devices."""
  split: Any = P(plan.axes)
  per_row: Any = P(None, plan.axes)
  everywhere: Any = P()
  return Inputs(split, per_row, everywhere, everywhere, per_row, split)


def _on_devices(plan: Plan, local: Callable, in_specs: tuple, out_specs: Any) -> Callable:
  if plan.mesh is None or plan.devices == 1:
    return local
  # The check of replication is for derivatives through the map, and none is taken.
  return jax.shard_map(
    local,
    mesh=contexts.automatic_mesh(plan.mesh),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )


def _both(inputs: Inputs) -> tuple[Rows, Rows]:
  return (
    Rows(inputs.image, inputs.groups, inputs.valid),
    Rows(inputs.texts, inputs.groups, inputs.valid),
  )


def _positive(image: jax.Array, texts: jax.Array) -> jax.Array:
  """Cosines of the pairs in float32: [K,R]."""
  return jnp.sum(image.astype(jnp.float32) * texts.astype(jnp.float32), axis=-1)


def _gather(plan: Plan, x: Any, axis: int) -> Any:
  """[..,R,..] -> [..,B,..], in every leaf."""
  if plan.devices == 1:
    return x
  return jax.tree.map(lambda a: jax.lax.all_gather(a, plan.axes, axis=axis, tiled=True), x)


def _gather_rows(plan: Plan, rows: Rows) -> Rows:
  """All texts [K,B,E] from those of each device [K,R,E]."""
  x, groups = _gather(plan, (rows.x, rows.groups), 1)
  return Rows(x, groups, _gather(plan, rows.valid, 0))


def _gathered_sums(
  plan: Plan, image: Rows, texts: Rows, scale: jax.Array, bias: jax.Array
) -> tuple[Sums, Side]:
  everyone = _gather_rows(plan, texts)
  rows, column = blocks.sums(plan.kind, image, everyone, scale, bias, plan.chunk)
  if plan.devices == 1:
    return rows, column
  best = jax.lax.pmax(column.best, plan.axes)
  total = column.total
  if plan.kind == "softmax":
    total *= jnp.exp(column.best - best)
  total = jax.lax.psum_scatter(total, plan.axes, scatter_dimension=1, tiled=True)
  first = jax.lax.axis_index(plan.axes) * total.shape[1]
  return rows, Side(jax.lax.dynamic_slice_in_dim(best, first, total.shape[1], 1), total)


def _gathered_gradients(
  plan: Plan,
  image: Rows,
  image_back: Back,
  texts: Rows,
  texts_back: Back,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  everyone, everyone_back = _gather_rows(plan, texts), _gather(plan, texts_back, 1)
  image_grad, texts_grad, *rest = blocks.gradients(
    plan.kind, image, image_back, everyone, everyone_back, scale, bias, plan.chunk
  )
  if plan.devices > 1:
    texts_grad = jax.lax.psum_scatter(texts_grad, plan.axes, scatter_dimension=1, tiled=True)
  return image_grad, texts_grad, rest[0], rest[1]


def _next_device(plan: Plan, x: Any) -> Any:
  """Every leaf from the device before this one."""
  if plan.devices == 1:
    return x
  hops = [(i, (i + 1) % plan.devices) for i in range(plan.devices)]
  return jax.tree.map(lambda a: jax.lax.ppermute(a, plan.axes, hops), x)


def _ring_sums(
  plan: Plan, image: Rows, texts: Rows, scale: jax.Array, bias: jax.Array
) -> tuple[Sums, Side]:
  empty = blocks.empty_side(texts.x[:, :, 0])
  zeros = contexts.zeros(empty.best.shape, texts.x)

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    visitors, column, seen = carry
    found, found_column = blocks.sums(plan.kind, image, visitors, scale, bias, plan.chunk)
    column = blocks.merge(plan.kind, column, found_column)
    seen = Sums(
      blocks.merge(plan.kind, seen.side, found.side),
      seen.cosines + found.cosines,
      seen.number + found.number,
    )
    return (*_next_device(plan, (visitors, column)), seen), None

  start = (texts, empty, Sums(empty, zeros, zeros))
  (_, column, rows), _ = jax.lax.scan(step, start, length=plan.devices)
  return rows, column


def _ring_gradients(
  plan: Plan,
  image: Rows,
  image_back: Back,
  texts: Rows,
  texts_back: Back,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  zero = contexts.zeros((), texts.x)
  zeros = [contexts.zeros(rows.x.shape, texts.x) for rows in (image, texts)]

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    visitors, back, texts_grad, image_grad, scale_grad, bias_grad = carry
    found = blocks.gradients(plan.kind, image, image_back, visitors, back, scale, bias, plan.chunk)
    home = _next_device(plan, (visitors, back, texts_grad + found[1]))
    return (*home, image_grad + found[0], scale_grad + found[2], bias_grad + found[3]), None

  start = (texts, texts_back, zeros[1], zeros[0], zero, zero)
  (_, _, texts_grad, *rest), _ = jax.lax.scan(step, start, length=plan.devices)
  return rest[0], texts_grad, rest[1], rest[2]


_SUMS = {"gathered": _gathered_sums, "ring": _ring_sums}
_GRADIENTS = {"gathered": _gathered_gradients, "ring": _ring_gradients}
