"""Distillation from a frozen teacher: distance of embeddings, or of similarities of images."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from apps.trainer.losses.loss_term import LossContext, LossOutput, LossTerm, Params
import ov_losses
import ov_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromTeacher(LossTerm):
  """Base of the losses that read the teacher's embedding of each image, `batch["teacher"]`.

  Attributes:
    teacher: workdir of a run or an import, or a folder of `ov_models.save`; its image tower embeds
      each batch, see `apps.trainer.teacher`.
    embeddings: folder of stored embeddings to read instead, see `apps.trainer.stored_teacher`.
  """

  teacher: str = ""
  embeddings: str = ""

  def check(self, model: ov_models.VisionLanguageConfig) -> None:
    """Raise ValueError unless one of the two paths is set."""
    if bool(self.teacher) == bool(self.embeddings):
      raise ValueError(
        f"config.loss.more has a distillation with teacher={self.teacher!r} and "
        f"embeddings={self.embeddings!r}; set exactly one: the folder of a model, or of embeddings "
        "written by --store_teacher"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(FromTeacher):
  """Cosine distance of a linear projection of the pooled features to the teacher's embedding.

  It is the feature distillation of CLIP-KD, https://arxiv.org/abs/2307.12732, on unit vectors. Its
  weight is the number of valid rows.
  """

  def logical_axes(self, model: ov_models.VisionLanguageConfig, teacher_dim: int) -> Params:
    """Return the axes of the projection [D, E]."""
    return {"kernel": ("embed", None)}

  def init(self, key: jax.Array, model: ov_models.VisionLanguageConfig, teacher_dim: int) -> Params:
    """Return the projection; its outputs have the variance of its inputs."""
    width = model.encoder.width
    return {"kernel": jax.random.normal(key, (width, teacher_dim)) / math.sqrt(width)}

  def __call__(self, context: LossContext) -> LossOutput:
    """Return the mean over the valid rows."""
    pooled = context.outputs.image.pooled.astype(jnp.float32)
    out = ov_losses.embedding_distance(
      pooled @ context.own["kernel"], context.batch["teacher"], valid=context.batch["valid"]
    )
    return LossOutput(out.loss, out.num_rows, {"distill_loss": out.loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affinity(FromTeacher):
  """Divergence of the similarities of images from those of the teacher; no projection.

  It is the affinity mimicking of TinyCLIP, https://arxiv.org/abs/2309.12314, between images.

  Attributes:
    temperature: divides the cosine similarities of both models.
  """

  compares_rows: ClassVar[bool] = True

  temperature: float = 0.1

  def check(self, model: ov_models.VisionLanguageConfig) -> None:
    """Raise ValueError for invalid paths or an invalid temperature."""
    super().check(model)
    if self.temperature <= 0:
      raise ValueError(
        f"config.loss.more.affinity.temperature={self.temperature}; expected a number above 0"
      )

  def rows(self, context: LossContext) -> dict[str, jax.Array]:
    """Return the embeddings [B, E] of the student and [B, F] of the teacher."""
    return {"student": context.outputs.image.raw, "teacher": context.batch["teacher"]}

  def compare(
    self, params: Params, rows: dict[str, jax.Array], mesh: jax.sharding.Mesh
  ) -> LossOutput:
    """Return the mean over the valid rows."""
    out = ov_losses.affinity_divergence(
      rows["student"], rows["teacher"], valid=rows["valid"], temperature=self.temperature
    )
    return LossOutput(out.loss, out.num_rows, {"affinity_loss": out.loss})
