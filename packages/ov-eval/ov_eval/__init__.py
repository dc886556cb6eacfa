"""Model-independent evaluation: takes functions and batches, returns exact, mergeable metrics."""

from ov_eval.caption_scores import (
  Bleu,
  bleu4,
  caption_metrics,
  cider,
  cider_scores,
)
from ov_eval.caption_text import caption_words
from ov_eval.captions import (
  AttributeAccuracy,
  CaptionRecord,
  attribute_accuracy,
  caption_statistics,
  generate_captions,
)
from ov_eval.classes import ClassSet, TemplateSet, class_set, class_texts, template_set
from ov_eval.embeddings import (
  Collected,
  collect_embeddings,
  embed_texts,
  flatten_captions,
  merge_captions,
)
from ov_eval.generative import (
  Classification,
  canonicalise,
  class_prompts,
  classify_by_likelihood,
  prompts_hash,
)
from ov_eval.groups import group_accuracy, worst_group
from ov_eval.knn import knn, majority
from ov_eval.likelihood import CaptionNLL, caption_nll
from ov_eval.lists import normalise_name, read_prompts
from ov_eval.multi_label import average_precision
from ov_eval.probe import FewShot, Probe, few_shot, linear_probe
from ov_eval.processes import across_processes, gather
from ov_eval.ptb import ptb_words
from ov_eval.results import Result, ResultFile, read_results, with_context, write_results
from ov_eval.retrieval import QueryRanks, RetrievalResult, Retrieved, retrieval, top_retrieved
from ov_eval.selection import Selection, jaccard, select_pairs
from ov_eval.states import Confusion, Mean, Share
from ov_eval.suites import (
  SUITES,
  BenchmarkSet,
  benchmark_classes,
  benchmark_prompts,
  benchmark_templates,
)
from ov_eval.zero_shot import (
  Predictions,
  class_embeddings,
  classify_by_embedding,
  worst_mistakes,
)

__all__ = [
  "worst_group",
  "select_pairs",
  "jaccard",
  "group_accuracy",
  "benchmark_templates",
  "benchmark_prompts",
  "benchmark_classes",
  "average_precision",
  "Selection",
  "BenchmarkSet",
  "SUITES",
  "AttributeAccuracy",
  "Bleu",
  "CaptionNLL",
  "CaptionRecord",
  "ClassSet",
  "Classification",
  "Collected",
  "Confusion",
  "FewShot",
  "Mean",
  "Predictions",
  "Probe",
  "QueryRanks",
  "Result",
  "ResultFile",
  "RetrievalResult",
  "Retrieved",
  "Share",
  "TemplateSet",
  "across_processes",
  "attribute_accuracy",
  "bleu4",
  "canonicalise",
  "caption_metrics",
  "caption_nll",
  "caption_statistics",
  "caption_words",
  "cider",
  "cider_scores",
  "class_embeddings",
  "class_prompts",
  "class_set",
  "class_texts",
  "classify_by_embedding",
  "classify_by_likelihood",
  "collect_embeddings",
  "embed_texts",
  "few_shot",
  "flatten_captions",
  "gather",
  "generate_captions",
  "knn",
  "linear_probe",
  "majority",
  "merge_captions",
  "normalise_name",
  "prompts_hash",
  "ptb_words",
  "read_prompts",
  "read_results",
  "retrieval",
  "template_set",
  "top_retrieved",
  "with_context",
  "worst_mistakes",
  "write_results",
]
