"""Contrastive losses over the global batch, softmax (CLIP) and sigmoid (SigLIP).

  logit_kij = scale * <image_i, text_kj> (+ bias)
  softmax:  mean over k and valid i of (CE(image i -> texts k) + CE(text ki -> images)) / 2
  sigmoid:  mean over k and valid i of softplus(-logit_kii) + sum_j softplus(logit_kij), j != i

Radford et al. 2021, https://arxiv.org/abs/2103.00020; Zhai et al. 2023,
https://arxiv.org/abs/2303.15343. Texts of different k (several positives per image) are not
contrasted with each other. CE is computed as softplus(logsumexp of the negatives - positive), which
is accurate when the loss is small. `similarity_forms` computes the sums over devices.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Real, Shaped
import numpy as np

from ov_losses import contexts
from ov_losses.shapes import AnyArray
from ov_losses.similarity_blocks import Kind
from ov_losses.similarity_forms import Form, Inputs, LossConfig, SimilarityStats, similarity_stats

AXES = ("data", "fsdp", "tensor")
# Cosines closer than this are ties: float32 summation order changes a cosine by up to this much.
# Without it, a collapsed model with identical rows may reach a top-1 of 1.
TIE = 2.0**-18


Texts = Float[AnyArray, "K B E"] | Float[AnyArray, "B E"]
Groups = Integer[AnyArray, "#K B"] | Integer[AnyArray, " B"]
Scalar = Real[AnyArray, ""] | float | np.number


class ContrastiveLoss(NamedTuple):
  """Loss and metrics of a batch: float32 scalars. Only `loss` is differentiable.

  Attributes:
    loss: mean over the valid rows and over K; 0 if no row is valid.
    num_valid: number of valid rows.
    image_top1: fraction of images whose own text scores above all negatives; cosines closer than
      `TIE` count as equal.
    text_top1: fraction of texts whose own image scores above all negatives.
    mean_positive: mean cosine of the positive pairs.
    mean_negative: mean cosine of the negative pairs; 0 if there are none.
  """

  loss: Float[Array, ""]
  num_valid: Float[Array, ""]
  image_top1: Float[Array, ""]
  text_top1: Float[Array, ""]
  mean_positive: Float[Array, ""]
  mean_negative: Float[Array, ""]


def contrastive_softmax(
  image: Float[AnyArray, "B E"],
  texts: Texts,
  scale: Scalar,
  *,
  valid: Shaped[AnyArray, " B"] | None = None,
  text_groups: Groups | None = None,
  form: Form = "gathered",
  mesh: Mesh | None = None,
  axes: tuple[str, ...] = AXES,
  chunk: int | None = None,
) -> ContrastiveLoss:
  """Compute the symmetric softmax cross-entropy of each image against all texts (CLIP).

  Matmuls run in the dtype of `image` with float32 accumulation and, for float32, full precision;
  everything else is float32. Gradients have the dtypes of the arguments.

  Args:
    image: normalised image embeddings, float32 or bfloat16.
    texts: normalised text embeddings in the dtype of `image`; row i of each k belongs to image i.
    scale: positive factor of the cosines, for example `jnp.exp(log_scale)`.
    valid: rows with False are ignored, even if they contain NaN. None: all rows are valid.
    text_groups: rows with equal numbers are not negatives of each other; see the function
      `text_groups`. None: all texts differ.
    form: implementation. "gathered" and "ring" compute one block of the similarity matrix at a
      time, "naive" all of it. The value and gradients are the same.
    mesh: device mesh whose `axes` split the rows; requires a call inside `jit`. None: one device.
    axes: mesh axis names; names that the mesh does not have are ignored.
    chunk: maximum number of image rows per block. Default: blocks of at most 4 million elements.

  Raises:
    ValueError: if a shape, dtype or option is invalid.
  """
  config = _loss_config("softmax", form, mesh, axes, chunk)
  inputs = _inputs(config, image, texts, scale, 0.0, valid, text_groups)
  return contexts.run(functools.partial(_softmax, config), inputs)


def _softmax(config: LossConfig, inputs: Inputs) -> ContrastiveLoss:
  inputs = _zero_invalid_rows(config, inputs)
  stats = similarity_stats(config, inputs)
  positive = inputs.scale * stats.positive
  both = jax.nn.softplus(stats.row - positive) + jax.nn.softplus(stats.column - positive)
  return _result(inputs, stats, positive, both / 2)


def contrastive_sigmoid(
  image: Float[AnyArray, "B E"],
  texts: Texts,
  scale: Scalar,
  bias: Scalar,
  *,
  valid: Shaped[AnyArray, " B"] | None = None,
  text_groups: Groups | None = None,
  form: Form = "gathered",
  mesh: Mesh | None = None,
  axes: tuple[str, ...] = AXES,
  chunk: int | None = None,
) -> ContrastiveLoss:
  """Compute the binary cross-entropy of all pairs of the global batch, summed per image (SigLIP).

  Arguments and errors are those of `contrastive_softmax`. `bias` is added to every logit; the paper
  initialises it to -10.
  """
  config = _loss_config("sigmoid", form, mesh, axes, chunk)
  inputs = _inputs(config, image, texts, scale, bias, valid, text_groups)
  return contexts.run(functools.partial(_sigmoid, config), inputs)


def _sigmoid(config: LossConfig, inputs: Inputs) -> ContrastiveLoss:
  inputs = _zero_invalid_rows(config, inputs)
  stats = similarity_stats(config, inputs)
  positive = inputs.scale * stats.positive + inputs.bias
  return _result(inputs, stats, positive, jax.nn.softplus(-positive) + stats.row)


def clamp_log_scale(log_scale: Float[Array, "*shape"], max_scale: float) -> Float[Array, "*shape"]:
  """Clip the log-temperature parameter to [0, log(max_scale)].

  Apply it to the parameter after each optimizer update, as open_clip does with `max_scale=100`.
  Inside the loss, the gradient would be 0 outside the interval, so a temperature beyond the limit
  could never return.

  Args:
    log_scale: log-temperature parameter; the loss multiplies cosines by its exponential.
    max_scale: largest factor of the cosines, at least 1.

  Returns:
    The clipped parameter with unchanged dtype.

  Raises:
    ValueError: if `max_scale` is below 1 or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> import ov_losses
    >>> round(float(jnp.exp(ov_losses.clamp_log_scale(jnp.log(200.0), 100.0))))
    100
  """
  if not 1 <= max_scale < math.inf:
    raise ValueError(f"max_scale={max_scale}; expected a finite number of at least 1, such as 100.")
  return jnp.clip(log_scale, 0.0, math.log(max_scale))


def text_groups(ids: Integer[AnyArray, "*shape T"]) -> Int[Array, "*shape"]:
  """Return an int32 hash of each text of token ids, so that equal texts have equal numbers.

  Two different texts collide with probability 2^-32, which removes one negative from the batch.

  Examples:
    >>> import jax.numpy as jnp
    >>> import ov_losses
    >>> first, second, third = ov_losses.text_groups(jnp.array([[1, 7, 2], [1, 9, 2], [1, 7, 2]]))
    >>> bool(first == third), bool(first == second)
    (True, False)
  """
  ids = jnp.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim < 1:
    raise ValueError(f"ids is {ids.dtype}{list(ids.shape)}; expected integers [...,T].")
  position = jnp.arange(ids.shape[-1], dtype=jnp.uint32)
  salted = ids.astype(jnp.uint32) + _murmur_finalize(position + 1)
  total = jnp.sum(_murmur_finalize(salted), axis=-1, dtype=jnp.uint32)
  return jax.lax.bitcast_convert_type(_murmur_finalize(total), jnp.int32)


def _murmur_finalize(x: jax.Array) -> jax.Array:
  """Apply the finaliser of MurmurHash3, a bijection of uint32."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _loss_config(
  kind: Kind, form: Form, mesh: Mesh | None, axes: tuple[str, ...], chunk: int | None
) -> LossConfig:
  if form not in ("naive", "gathered", "ring"):
    raise ValueError(f'form={form!r}; expected "naive", "gathered" or "ring".')
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk}; expected at least 1 image row, or None for the default.")
  present = tuple(axis for axis in axes if mesh is not None and axis in mesh.shape)
  if mesh is not None and not present:
    raise ValueError(
      f"axes={axes} are not axes of the mesh {mesh.axis_names}; pass the axes that split the "
      "batch, or mesh=None."
    )
  manual = set(present) & set(contexts.manual_axes())
  if mesh is not None and manual:
    raise ValueError(
      f"mesh={mesh.axis_names} inside jax.shard_map or jax.pmap over {sorted(manual)}; call the "
      "loss outside, or pass mesh=None for the loss over the local rows of each device."
    )
  return LossConfig(kind, form, mesh, present, chunk)


def _inputs(
  config: LossConfig,
  image: jax.Array,
  texts: jax.Array,
  scale: Scalar,
  bias: Scalar,
  valid: jax.Array | None,
  groups: jax.Array | None,
) -> Inputs:
  """Return the validated arguments with all axes."""
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
  if batch % config.devices:
    raise ValueError(
      f"batch of {batch} rows is not a multiple of {config.devices}, the devices of mesh axes "
      f"{config.axes}; the next multiple is {-(-batch // config.devices) * config.devices}."
    )
  if jnp.shape(scale) or jnp.shape(bias):
    raise ValueError(
      f"scale has shape {jnp.shape(scale)} and bias {jnp.shape(bias)}; expected scalars."
    )
  all_valid = jnp.asarray(np.ones(batch, bool) if valid is None else valid).astype(bool)
  if all_valid.shape != (batch,):
    raise ValueError(f"valid has shape {all_valid.shape}; expected [B] = {(batch,)}.")
  group_ids = jnp.asarray(np.arange(batch, dtype=np.int32) if groups is None else groups)
  group_ids = group_ids[None] if group_ids.ndim == 1 else group_ids
  is_integer = jnp.issubdtype(group_ids.dtype, jnp.integer)
  if group_ids.shape not in ((1, batch), texts.shape[:2]) or not is_integer:
    raise ValueError(
      f"text_groups is {group_ids.dtype}{list(group_ids.shape)}; expected integers [B] or [K,B] = "
      f"{texts.shape[:2]}."
    )
  return Inputs(image, texts, scale, bias, group_ids, all_valid)


def _zero_invalid_rows(config: LossConfig, inputs: Inputs) -> Inputs:
  """Cast scale and bias to float32, zero invalid rows, and pad an empty batch with invalid rows."""
  image, texts, scale, bias, groups, valid = inputs
  if not len(valid):
    more = lambda x, axis: jnp.pad(
      x, [(0, config.devices if i == axis else 0) for i in range(x.ndim)]
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
  inputs: Inputs, stats: SimilarityStats, positive: jax.Array, per_row: jax.Array
) -> ContrastiveLoss:
  """Average the [K,B] arrays over the valid rows; `positive` contains the positive logits."""
  num_valid = jnp.sum(inputs.valid, dtype=jnp.float32)
  mean = lambda x: jnp.sum(jnp.where(inputs.valid, x, 0)) / jnp.maximum(num_valid * len(x), 1)
  stats, positive = jax.lax.stop_gradient((stats, positive - inputs.scale * TIE))
  return ContrastiveLoss(
    loss=mean(per_row),
    num_valid=num_valid,
    image_top1=mean((positive > stats.best_row).astype(jnp.float32)),
    text_top1=mean((positive > stats.best_column).astype(jnp.float32)),
    mean_positive=mean(stats.positive),
    mean_negative=jnp.sum(stats.cosines) / jnp.maximum(jnp.sum(stats.num_negatives), 1),
  )
