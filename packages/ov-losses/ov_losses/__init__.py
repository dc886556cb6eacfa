"""Losses as pure functions: no model, no mesh, no state."""

from ov_losses.caption import (
  CaptionLoss,
  caption_cross_entropy,
  sequence_log_likelihood,
  shift_left,
)

__all__ = [
  "CaptionLoss",
  "caption_cross_entropy",
  "sequence_log_likelihood",
  "shift_left",
]
