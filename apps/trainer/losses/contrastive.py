"""Contrastive losses between images and texts: softmax (CLIP) and sigmoid (SigLIP)."""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from apps.trainer.losses.loss_term import LossContext, LossOutput, LossTerm, Params
import ov_losses
import ov_models

Inputs = tuple[jax.Array, jax.Array, jax.Array]
Result = tuple[ov_losses.ContrastiveLoss, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(LossTerm, abc.ABC):
  """Base of the contrastive losses, averaged over the K texts of an image.

  Attributes:
    form: implementation of the loss; all forms are equal, see ov_losses.
    chunk: rows of a block of similarities; 0 chooses automatically.
    mask_duplicates: images with equal texts are not negatives of each other.
    max_scale: upper limit of the inverse temperature; the parameter is clipped after every update,
      as in open_clip. None disables it, as in the released OpenVision code.
  """

  compares_rows: ClassVar[bool] = True
  batch_keys: ClassVar[tuple[str, ...]] = ("alt_ids",)

  form: Literal["gathered", "ring", "naive"] = "gathered"
  chunk: int = 0
  mask_duplicates: bool = False
  max_scale: float | None = None

  def check(self, model: ov_models.VisionLanguageConfig) -> None:
    """Raise ValueError if the model has no text tower."""
    if model.text is None:
      raise ValueError(
        "a contrastive loss needs a text tower, and config.model.text is empty; set it, or set "
        "config.loss.clip and siglip to 0"
      )

  def rows(self, context: LossContext) -> dict[str, jax.Array]:
    """Return image [B, E], texts [B, K, E], norms [B, 2], and groups int32 [B, K] if masked."""
    image, text = context.outputs.image, context.outputs.text
    assert text is not None and context.texts is not None  # `check`
    rows = {"image": image.unit, "texts": text.unit}
    rows["norms"] = jnp.stack([_norm(image.raw), _norm(text.raw[:, 0])], axis=1)
    if self.mask_duplicates:
      rows["groups"] = ov_losses.text_groups(context.texts.swapaxes(0, 1)).T
    return rows

  def compare(
    self, params: Params, rows: dict[str, jax.Array], mesh: jax.sharding.Mesh
  ) -> LossOutput:
    """Return the loss over all rows; its weight is the number of valid rows."""
    valid = rows["valid"]
    count = valid.sum().astype(jnp.float32)
    scale = jnp.exp(params["log_scale"])
    norms = (rows["norms"] * valid[:, None]).sum(0) / jnp.maximum(count, 1)
    metrics = {"scale": scale, "image_norm": norms[0], "text_norm": norms[1]}
    out, own = self._loss(
      params,
      (rows["image"], rows["texts"].swapaxes(0, 1), scale),
      valid=valid,
      text_groups=rows["groups"].T if self.mask_duplicates else None,
      form=self.form,
      mesh=mesh,
      chunk=self.chunk or None,
    )
    names = ("image_top1", "text_top1", "mean_positive", "mean_negative")
    return LossOutput(out.loss, count, metrics | own | {name: getattr(out, name) for name in names})

  def project(self, params: Params) -> Params:
    """Return params with the temperature clipped to [0, log(max_scale)]."""
    if self.max_scale is None or "log_scale" not in params:
      return params
    return params | {"log_scale": ov_losses.clamp_log_scale(params["log_scale"], self.max_scale)}

  @abc.abstractmethod
  def _loss(self, params: Params, inputs: Inputs, **options: Any) -> Result:
    """Return the loss and its metrics.

    Args:
      params: parameters of the model.
      inputs: image [B, E], texts [K, B, E] and the scale.
      **options: keyword arguments of the functions in ov_losses.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(Contrastive):
  """Softmax over the batch, https://arxiv.org/abs/2103.00020."""

  def _loss(self, params: Params, inputs: Inputs, **options: Any) -> Result:
    out = ov_losses.contrastive_softmax(*inputs, **options)
    return out, {"clip_loss": out.loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siglip(Contrastive):
  """Sigmoid of each pair, https://arxiv.org/abs/2303.15343."""

  def _loss(self, params: Params, inputs: Inputs, **options: Any) -> Result:
    bias = params.get("bias", jnp.zeros(()))
    out = ov_losses.contrastive_sigmoid(*inputs, bias, **options)
    return out, {"siglip_loss": out.loss, "bias": bias}


def _norm(x: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(jnp.linalg.norm(x, axis=-1))
