"""Adafactor: factored second moment, no first moment."""

import dataclasses
from typing import Any

import jax
import optax

from apps.trainer.optimizers.update_rule import (
  named_chain,
  per_layer,
  require,
  require_decays,
  require_positive,
)

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Adafactor:
  """`optax.scale_by_factored_rms` (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235).

  Updates have an RMS of about 1 in every layer, so learning rates are those of AdamW. The decay
  rate of the second moment at step t is 1 - (t + 1)^-decay_rate, so early means cover all steps.

  Attributes:
    decay_rate: exponent of the decay rate of the second moment.
    min_dim_size_to_factor: minimum size of the second-largest dimension of factored arrays.
    eps: constant added to the squared gradients.
    clipping_threshold: maximum RMS of the update of a layer.
    scale_parameters: multiply the update of a layer by the RMS of its parameters, as in the paper;
      the learning rate is then relative.
    momentum: decay rate of a float32 average of the updates; 0 disables it.
  """

  decay_rate: float = 0.8
  min_dim_size_to_factor: int = 128
  eps: float = 1e-30
  clipping_threshold: float = 1.0
  scale_parameters: bool = False
  momentum: float = 0.0

  def __post_init__(self) -> None:
    require(self, "decay_rate", 0 < self.decay_rate <= 1, "in (0, 1]")
    require(self, "min_dim_size_to_factor", self.min_dim_size_to_factor > 1, "at least 2")
    require_positive(self, "eps", "clipping_threshold")
    require_decays(self, "momentum")

  def build(self) -> optax.GradientTransformation:
    """Return the chain of `optax.adafactor` without learning rate and weight decay."""
    second_moment = optax.scale_by_factored_rms(
      decay_rate=self.decay_rate,
      min_dim_size_to_factor=self.min_dim_size_to_factor,
      epsilon=self.eps,
    )
    parts = [
      ("second_moment", _with_dimensions_of_params(second_moment)),
      ("clip", _per_layer(optax.clip_by_block_rms(self.clipping_threshold))),
    ]
    if self.scale_parameters:
      parts.append(("parameter_scale", _per_layer(optax.scale_by_param_block_rms())))
    if self.momentum:
      parts.append(("momentum", optax.ema(self.momentum, debias=False)))
    return named_chain(*parts)


def _per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Apply a stateless optax transformation with a block per array to each layer."""
  return per_layer(lambda update, param: tx.update(update, tx.init(param), param)[0])


def _with_dimensions_of_params(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Keep the averaged axis in the means of `scale_by_factored_rms`, with length 1.

  Every mean then has as many dimensions as its parameter and is sharded like it.
  """

  def expand(state: Any, params: PyTree) -> Any:
    # Row means lack the largest axis, column means the second largest. For equal axes optax treats
    # the last one as the largest.
    rows = jax.tree.map(lambda x, p: x.reshape(_shape(x, p, last=True)), state.v_row, params)
    columns = jax.tree.map(lambda x, p: x.reshape(_shape(x, p, last=False)), state.v_col, params)
    return state._replace(v_row=rows, v_col=columns)

  def squeeze(mean: jax.Array, param: jax.Array) -> jax.Array:
    if mean.ndim != param.ndim or mean.ndim < 2:
      return mean  # placeholder of a mean that is not kept
    (axis,) = (i for i, n in enumerate(mean.shape) if n != param.shape[i])
    return mean.squeeze(axis)

  def init(params: PyTree) -> Any:
    return expand(tx.init(params), params)

  def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
    rows, columns = (jax.tree.map(squeeze, part, updates) for part in (state.v_row, state.v_col))
    out, state = tx.update(updates, state._replace(v_row=rows, v_col=columns), params)
    return out, expand(state, updates)

  return optax.GradientTransformation(init, update)


def _shape(mean: jax.Array, param: jax.Array, *, last: bool) -> tuple[int, ...]:
  """Return the shape of a param with 1 for the axis that its mean lacks, or of a placeholder.

  Args:
    mean: mean over rows or columns.
    param: parameter that the mean belongs to.
    last: use the last matching axis instead of the first.
  """
  if mean.ndim != param.ndim - 1 or mean.ndim == 0:
    return mean.shape
  lengths = param.shape
  fits = [i for i in range(param.ndim) if lengths[:i] + lengths[i + 1 :] == mean.shape]
  if not fits:
    return mean.shape
  axis = fits[-1] if last else fits[0]
  return (*lengths[:axis], 1, *lengths[axis + 1 :])
