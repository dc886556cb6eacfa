"""Contrastive losses over the global batch, softmax (CLIP) and sigmoid (SigLIP).

  logit_kij = scale * <image_i, text_kj> (+ bias)
  softmax:  mean over k and valid i of (CE(image i -> texts k) + CE(text ki -> images)) / 2
  sigmoid:  mean over k and valid i of softplus(-logit_kii) + sum_j softplus(logit_kij), j != i

Radford et al. 2021, https://arxiv.org/abs/2103.00020; Zhai et al. 2023,
https://arxiv.org/abs/2303.15343. The texts of different k (several positives per image) are not
contrasted with each other. CE is softplus(logsumexp of the negatives - positive), which keeps its
digits where the loss is small. How the sums are made, and by which devices: `similarity_forms`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from ov_losses import contexts
from ov_losses.similarity_blocks import Kind
from ov_losses.similarity_forms import Form, Inputs, Pairs, Plan, pairs

AXES = ("data", "fsdp", "tensor")
# Float32 sums in another order give the cosine of the same two rows up to this apart. Nearer than
# that is a tie: without it a model whose rows are all alike may find every pair.
TIE = 2.0**-18


class ContrastiveLoss(NamedTuple):
  """What one batch gives; float32 scalars, and only `loss` is differentiable.

  Attributes:
    loss: mean over the valid rows and over K; 0 where no row is valid.
    num_valid: number of valid rows.
    image_top1: share of the images whose own text scores above all its negatives; cosines nearer
      than `TIE` are equal.
    text_top1: share of the texts whose own image does.
    mean_positive: mean cosine of the pairs.
    mean_negative: mean cosine of the negatives, 0 where there are none.
  """

  loss: jax.Array
  num_valid: jax.Array
  image_top1: jax.Array
  text_top1: jax.Array
  mean_positive: jax.Array
  mean_negative: jax.Array


def contrastive_softmax(
  image: jax.Array,  # [B,E] float32 or bfloat16, unit rows
  texts: jax.Array,  # [K,B,E] or [B,E], same dtype
  scale: jax.Array,  # [] > 0, the inverse temperature
  *,
  valid: jax.Array | None = None,
  text_groups: jax.Array | None = None,
  form: Form = "gathered",
  mesh: Mesh | None = None,
  axes: tuple[str, ...] = AXES,
  chunk: int | None = None,
) -> ContrastiveLoss:
  """Softmax cross-entropy both ways, each image against all texts of the global batch.

  Products are in the dtype of `image`, accumulated in float32, and float32 rows are not rounded on
  any device; everything else is float32. Gradients come back in the dtypes of the arguments.

  Args:
    image: row i is image i.
    texts: row i of each k is a text of image i.
    scale: factor on the cosines, already exponentiated, for example `jnp.exp(log_scale)`.
    valid: bool [B]; rows with False take part in nothing, whatever they hold. None: all take part.
    text_groups: int [K,B] or [B]; pairs of equal numbers are no negatives of each other. See the
      function `text_groups`. None: every text is different.
    form: "gathered" and "ring" hold one block of the similarity matrix at a time, "naive" all of
      it. All have the same value and gradients.
    mesh: the rows are split over its `axes`; call inside `jit` then. None: one device.
    axes: names of mesh axes; those the mesh does not have are left out.
    chunk: most image rows per block, by default such that a block has 4 million entries.

  Raises:
    ValueError: on shapes, dtypes or options that do not fit; the message names them.
  """
  plan = _plan("softmax", form, mesh, axes, chunk)
  inputs = _inputs(plan, image, texts, scale, 0.0, valid, text_groups)
  return contexts.run(functools.partial(_softmax, plan), inputs)


def _softmax(plan: Plan, inputs: Inputs) -> ContrastiveLoss:
  inputs = _prepared(plan, inputs)
  sums = pairs(plan, inputs)
  positive = inputs.scale * sums.positive
  both = jax.nn.softplus(sums.row - positive) + jax.nn.softplus(sums.column - positive)
  return _result(inputs, sums, positive, both / 2)


def contrastive_sigmoid(
  image: jax.Array,  # [B,E] float32 or bfloat16, unit rows
  texts: jax.Array,  # [K,B,E] or [B,E], same dtype
  scale: jax.Array,  # [] > 0
  bias: jax.Array,  # []
  *,
  valid: jax.Array | None = None,
  text_groups: jax.Array | None = None,
  form: Form = "gathered",
  mesh: Mesh | None = None,
  axes: tuple[str, ...] = AXES,
  chunk: int | None = None,
) -> ContrastiveLoss:
  """Binary cross-entropy of every pair of the global batch, summed per image.

  Arguments and errors as in `contrastive_softmax`; `bias` is added to every logit (-10 at the start
  of the paper's training).
  """
  plan = _plan("sigmoid", form, mesh, axes, chunk)
  inputs = _inputs(plan, image, texts, scale, bias, valid, text_groups)
  return contexts.run(functools.partial(_sigmoid, plan), inputs)


def _sigmoid(plan: Plan, inputs: Inputs) -> ContrastiveLoss:
  inputs = _prepared(plan, inputs)
  sums = pairs(plan, inputs)
  positive = inputs.scale * sums.positive + inputs.bias
  return _result(inputs, sums, positive, jax.nn.softplus(-positive) + sums.row)


def clamp_log_scale(log_scale: jax.Array, max_scale: float) -> jax.Array:
  """Clip the log-temperature parameter to [0, log(max_scale)].

  Apply it to the parameter after each optimizer update, as open_clip does with `max_scale=100`.
  Applied inside the loss it would have no gradient outside the interval, and a temperature that
  once crossed the limit could never return.

  Args:
    log_scale: the parameter; the loss multiplies cosines by its exponential.
    max_scale: largest factor on the cosines, at least 1.

  Returns:
    The clipped parameter, in its own dtype.

  Raises:
    ValueError: `max_scale` is below 1 or not finite.
  """
  if not 1 <= max_scale < math.inf:
    raise ValueError(f"max_scale={max_scale}; expected a finite number of at least 1, such as 100.")
  return jnp.clip(log_scale, 0.0, math.log(max_scale))


def text_groups(ids: jax.Array) -> jax.Array:
  """A number for each text, [...] int32 from token ids [...,T]: equal texts, equal numbers.

  A 32-bit hash: two different texts share a number about once in 4 billion pairs, which takes one
  negative out of a batch.
  """
  ids = jnp.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim < 1:
    raise ValueError(f"ids is {ids.dtype}{list(ids.shape)}; expected integers [...,T].")
  position = jnp.arange(ids.shape[-1], dtype=jnp.uint32)
  salted = ids.astype(jnp.uint32) + _mixed(position + 1)
  total = jnp.sum(_mixed(salted), axis=-1, dtype=jnp.uint32)
  return jax.lax.bitcast_convert_type(_mixed(total), jnp.int32)


def _mixed(x: jax.Array) -> jax.Array:
  """The finaliser of MurmurHash3, a bijection of uint32 that spreads every bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _plan(
  kind: Kind, form: Form, mesh: Mesh | None, axes: tuple[str, ...], chunk: int | None
) -> Plan:
  if form not in ("naive", "gathered", "ring"):
    raise ValueError(f'form={form!r}; expected "naive", "gathered" or "ring".')
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk}; expected at least 1 image row, or None to choose.")
  present = tuple(axis for axis in axes if mesh is not None and axis in mesh.shape)
  if mesh is not None and not present:
    raise ValueError(
      f"axes={axes} are none of the mesh's, {mesh.axis_names}; name the axes the batch is split "
      "over, or pass mesh=None."
    )
  inside = set(present) & set(contexts.manual_axes())
  if mesh is not None and inside:
    raise ValueError(
      f"mesh={mesh.axis_names} inside jax.shard_map or jax.pmap over {sorted(inside)}: each device "
      "holds its own rows there; call the loss outside, or pass mesh=None for the loss among the "
      "rows of each device."
    )
  return Plan(kind, form, mesh, present, chunk)


def _inputs(
  plan: Plan,
  image: jax.Array,
  texts: jax.Array,
  scale: jax.Array,
  bias: jax.Array | float,
  valid: jax.Array | None,
  groups: jax.Array | None,
) -> Inputs:
  """Checked arguments with all axes."""
  image, texts, scale, bias = map(jnp.asarray, (image, texts, scale, bias))
  texts = texts[None] if texts.ndim == 2 else texts
  if image.ndim != 2 or texts.ndim != 3 or texts.shape[1:] != image.shape:
    raise ValueError(
      f"image has shape {image.shape} and texts {texts.shape}; expected [B,E] and [K,B,E] or [B,E]."
    )
  if image.dtype != texts.dtype or image.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f"image is {image.dtype} and texts {texts.dtype}; expected both float32 or both bfloat16; "
      "cast them."
    )
  batch = image.shape[0]
  if batch % plan.devices:
    raise ValueError(
      f"batch of {batch} rows is not a multiple of {plan.devices}, the devices of mesh axes "
      f"{plan.axes}; the next size that fits is {-(-batch // plan.devices) * plan.devices}."
    )
  if jnp.shape(scale) or jnp.shape(bias):
    raise ValueError(
      f"scale has shape {jnp.shape(scale)} and bias {jnp.shape(bias)}; expected scalars."
    )
  all_valid = jnp.asarray(np.ones(batch, bool) if valid is None else valid).astype(bool)
  if all_valid.shape != (batch,):
    raise ValueError(f"valid has shape {all_valid.shape}; expected [B] = {(batch,)}.")
  numbers = jnp.asarray(np.arange(batch, dtype=np.int32) if groups is None else groups)
  numbers = numbers[None] if numbers.ndim == 1 else numbers
  whole = jnp.issubdtype(numbers.dtype, jnp.integer)
  if numbers.shape not in ((1, batch), texts.shape[:2]) or not whole:
    raise ValueError(
      f"text_groups is {numbers.dtype}{list(numbers.shape)}; expected integers [B] or [K,B] = "
      f"{texts.shape[:2]}."
    )
  return Inputs(image, texts, scale, bias, numbers, all_valid)


def _prepared(plan: Plan, inputs: Inputs) -> Inputs:
  """float32 factors, and zeros in the rows that are not valid; no rows become invalid ones."""
  image, texts, scale, bias, groups, valid = inputs
  if not len(valid):
    more = lambda x, axis: jnp.pad(
      x, [(0, plan.devices if i == axis else 0) for i in range(x.ndim)]
    )
    image, valid = more(image, 0), more(valid, 0)
    texts, groups = more(texts, 1), more(groups, 1)
  return Inputs(
    jnp.where(valid[:, None], image, 0),
    jnp.where(valid[:, None], texts, 0),
    scale.astype(jnp.float32),
    bias.astype(jnp.float32),
    groups,
    valid,
  )


def _result(
  inputs: Inputs, sums: Pairs, positive: jax.Array, per_row: jax.Array
) -> ContrastiveLoss:
  """Means of the [K,B] arrays over the valid rows; `positive` are the logits of the pairs."""
  num_valid = jnp.sum(inputs.valid, dtype=jnp.float32)
  mean = lambda x: jnp.sum(jnp.where(inputs.valid, x, 0)) / jnp.maximum(num_valid * len(x), 1)
  sums, positive = jax.lax.stop_gradient((sums, positive - inputs.scale * TIE))
  return ContrastiveLoss(
    loss=mean(per_row),
    num_valid=num_valid,
    image_top1=mean((positive > sums.best_row).astype(jnp.float32)),
    text_top1=mean((positive > sums.best_column).astype(jnp.float32)),
    mean_positive=mean(sums.positive),
    mean_negative=jnp.sum(sums.cosines) / jnp.maximum(jnp.sum(sums.number), 1),
  )
