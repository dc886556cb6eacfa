"""Evaluation that knows no model: functions and batches in, exact mergeable figures out."""

from ov_eval.captions import (
  AttributeAccuracy,
  CaptionRecord,
  attribute_accuracy,
  caption_statistics,
  generate_captions,
)
from ov_eval.generative import (
  Classification,
  canonicalise,
  class_prompts,
  classify_by_likelihood,
  prompts_hash,
)
from ov_eval.knn import knn, majority
from ov_eval.likelihood import CaptionNLL, caption_nll
from ov_eval.probe import FewShot, Probe, few_shot, linear_probe
from ov_eval.processes import across_processes, gather
from ov_eval.results import Result, write_results
from ov_eval.states import Confusion, Mean, Share

__all__ = [
  "majority",
  "knn",
  "linear_probe",
  "few_shot",
  "Probe",
  "FewShot",
  "AttributeAccuracy",
  "CaptionNLL",
  "CaptionRecord",
  "Classification",
  "Confusion",
  "Mean",
  "Result",
  "Share",
  "across_processes",
  "attribute_accuracy",
  "canonicalise",
  "caption_nll",
  "caption_statistics",
  "class_prompts",
  "classify_by_likelihood",
  "gather",
  "generate_captions",
  "prompts_hash",
  "write_results",
]
