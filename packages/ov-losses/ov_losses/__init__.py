"""Losses for vision-language models as pure functions."""

from ov_losses.caption import (
  CaptionLoss,
  caption_cross_entropy,
  sequence_log_likelihood,
  shift_left,
)
from ov_losses.contrastive import (
  ContrastiveLoss,
  clamp_log_scale,
  contrastive_sigmoid,
  contrastive_softmax,
  text_groups,
)
from ov_losses.distill import DistillationLoss, affinity_divergence, embedding_distance
from ov_losses.gradient_cache import LossTerms, gradient_cache

__all__ = [
  "CaptionLoss",
  "ContrastiveLoss",
  "DistillationLoss",
  "LossTerms",
  "affinity_divergence",
  "caption_cross_entropy",
  "clamp_log_scale",
  "contrastive_sigmoid",
  "contrastive_softmax",
  "embedding_distance",
  "gradient_cache",
  "sequence_log_likelihood",
  "shift_left",
  "text_groups",
]
