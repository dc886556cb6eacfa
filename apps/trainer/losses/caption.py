"""Next-token loss of captions for every kind of decoder."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from apps.trainer.losses.loss_term import LossContext, LossOutput, LossTerm
import ov_losses
import ov_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(LossTerm):
  """Cross-entropy of caption tokens: teacher-forced, with learned queries, or in parallel.

  The decoder determines which (https://arxiv.org/abs/2505.04601, https://arxiv.org/abs/2509.01644,
  https://arxiv.org/abs/2306.07915). The weight of the loss is the number of target tokens; the
  begin token is never a target.

  Attributes:
    label_smoothing: probability mass spread evenly over the vocabulary, in [0, 1).
    z_loss: factor on the squared log-partition function.
  """

  batch_keys: ClassVar[tuple[str, ...]] = ("caption_ids",)

  label_smoothing: float = 0.0
  z_loss: float = 0.0

  def check(self, model: ov_models.VisionLanguageConfig) -> None:
    """Raise ValueError if the model has no decoder."""
    if model.decoder is None:
      raise ValueError(
        "config.loss.caption needs a decoder, and config.model.decoder is empty; set it, or set "
        "config.loss.caption to 0"
      )

  def __call__(self, context: LossContext) -> LossOutput:
    """Return the mean over the target tokens of valid rows."""
    hidden = context.outputs.hidden
    assert hidden is not None  # `check`
    targets, mask = ov_losses.shift_left(context.batch["caption_ids"], context.pad_id)
    mask = mask * context.batch["valid"][:, None]
    result = ov_losses.caption_cross_entropy(
      hidden,
      context.model.head_kernel,
      targets,
      mask,
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
      batch_shards=context.mesh.shape["data"] * context.mesh.shape["fsdp"],
    )
    metrics = {
      "caption_nll": result.nll,
      "token_accuracy": result.num_correct / jnp.maximum(result.num_tokens, 1),
    }
    return LossOutput(result.loss, result.num_tokens, metrics)
