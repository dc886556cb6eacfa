"""Tests of the evaluators selected for each model, with all data or none."""

import pytest

from apps.evaluators import EVALUATORS
from apps.trainer.run_config import RunConfig
import ov_models

_SIZES = {"image_size": 32, "vocab_size": 100}
CAPTIONER = ov_models.VisionLanguageConfig.openvision2("mu/16", "Ti", max_len=12, **_SIZES)
CLIP = ov_models.VisionLanguageConfig.from_names("mu/16", "Ti", None, text_len=16, **_SIZES)
QUERIES = ov_models.VisionLanguageConfig.from_names("mu/16", "Ti", "Ti", text_len=16, **_SIZES)


def _names(model, config):
  return [e.make.__name__ for e in EVALUATORS if e.model(model) and e.data(config)]


@pytest.mark.parametrize(
  "model, expected",
  [
    (
      CAPTIONER,
      ["CaptionLikelihood", "CaptionGenerator", "LikelihoodClassifier", "FeatureEvaluator"],
    ),
    (CLIP, ["ZeroShotEvaluator", "RetrievalEvaluator", "FeatureEvaluator"]),
    (
      QUERIES,
      ["CaptionLikelihood", "ZeroShotEvaluator", "RetrievalEvaluator", "FeatureEvaluator"],
    ),
  ],
  ids=["captioner", "clip", "clip with learned queries"],
)
def test_evaluators_of_each_model(model, expected):
  assert _names(model, RunConfig()) == []
  data = {
    "input.eval_data_dir": "/data/pairs",
    "eval.zero_shot.classes": "/data/classes.json",
    "eval.features.train_dir": "/data/features",
  }
  assert _names(model, RunConfig().with_settings(data)) == expected


def test_a_suite_is_not_skipped_for_any_model():
  config = RunConfig().with_settings({"eval.suite": "vtab"})
  for model in (CAPTIONER, CLIP, QUERIES):
    assert _names(model, config) == ["SuiteEvaluator"]


def test_retrieval_has_separate_data():
  config = RunConfig().with_settings({"eval.retrieval.dir": "/data/karpathy"})
  assert _names(QUERIES, config) == ["RetrievalEvaluator"]
