"""Interface of a term of the training loss."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

import ov_models

Params = Any  # nested dict of arrays
Batch = dict[str, jax.Array]


class LossOutput(NamedTuple):
  """Output of a loss.

  Attributes:
    loss: float32 [], mean over `weight` units (tokens for captions) of the whole batch.
    weight: float32 [], number of units of the mean; 0 if the batch has none.
    metrics: name -> float32 [], means over the same units.
  """

  loss: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossContext:
  """Inputs of a loss term.

  Attributes:
    params: parameters of the model; frozen ones carry no gradient.
    ema: average of the parameters without gradient; None if the run keeps none.
    own: parameters of this term, from its `init`.
    model: the model with its parameters.
    outputs: output of the model for the batch.
    batch: arrays [B, ...]: image, valid, index, the texts, and "teacher" if the run has one.
    texts: int32 [B, K, T], texts of the text tower; None without one.
    key: random key of this step and micro-batch, which `outputs` has also used.
    step: int32 [], completed steps of the stage.
    pad_id: padding id in the texts.
    mesh: devices of the batch.
  """

  params: Params
  ema: Params | None
  own: Params
  model: ov_models.VisionLanguageModel
  outputs: ov_models.VisionLanguageOutput
  batch: Batch
  texts: jax.Array | None
  key: jax.Array
  step: jax.Array
  pad_id: int
  mesh: jax.sharding.Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossTerm:
  """A weighted loss of the outputs of a model.

  A term is either a mean over units that each belong to one row of the batch, and implements
  `__call__`; or it compares rows with each other, and implements `rows` and `compare`. The trainer
  gathers the rows of all micro-batches, so accumulation is exact.

  Attributes:
    weight: factor on the loss; terms of weight 0 are skipped.
  """

  compares_rows: ClassVar[bool] = False
  batch_keys: ClassVar[tuple[str, ...]] = ()  # required texts of the batch

  weight: float = 1.0

  def check(self, model: ov_models.VisionLanguageConfig) -> None:
    """Check the fields of the term and its requirements on the model.

    Raises:
      ValueError: the message names the setting to change.
    """

  def logical_axes(self, model: ov_models.VisionLanguageConfig, teacher_dim: int) -> Params:
    """Return the tree of the term's own parameters with a tuple of axis names for each.

    Args:
      model: configuration of the model.
      teacher_dim: size of the teacher's embeddings; 0 without a teacher.
    """
    return {}

  def init(self, key: jax.Array, model: ov_models.VisionLanguageConfig, teacher_dim: int) -> Params:
    """Return the initial parameters of the term, in the tree of `logical_axes`; traceable.

    They are trained with those of the model, and are not part of an export.
    """
    return {}

  def __call__(self, context: LossContext) -> LossOutput:
    """Return the loss of a batch, or of a micro-batch, without the factor `weight`."""
    raise NotImplementedError(
      f"{type(self).__name__} has no __call__; write it, or set compares_rows and write rows and "
      "compare"
    )

  def rows(self, context: LossContext) -> dict[str, jax.Array]:
    """Return arrays [B, ...] of the rows for `compare`; "valid" bool [B] is added."""
    raise NotImplementedError(f"{type(self).__name__} sets compares_rows and has no rows; write it")

  def compare(
    self, params: Params, rows: dict[str, jax.Array], mesh: jax.sharding.Mesh
  ) -> LossOutput:
    """Return the loss over all rows of a batch, in order, without the factor `weight`."""
    raise NotImplementedError(
      f"{type(self).__name__} sets compares_rows and has no compare; write it"
    )

  def project(self, params: Params) -> Params:
    """Return the nearest parameters within the limits of this term; called after every update."""
    return params
