"""The table of evaluators: what each model can do, with data for everything or for nothing."""

import pytest

from apps.configs import base
from apps.evaluators import EVALUATORS
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
    (CAPTIONER, ["CaptionLikelihood", "CaptionWriter", "LikelihoodClassifier", "FeatureEvaluator"]),
    (CLIP, ["ZeroShotEvaluator", "RetrievalEvaluator", "FeatureEvaluator"]),
    (
      QUERIES,
      ["CaptionLikelihood", "ZeroShotEvaluator", "RetrievalEvaluator", "FeatureEvaluator"],
    ),
  ],
  ids=["captioner", "clip", "clip with learned queries"],
)
def test_models_are_evaluated_by_what_they_can_do(model, expected):
  config = base.clip_config()
  assert _names(model, config) == []
  config.input.eval_data_dir = "/data/pairs"
  config.eval.zero_shot.classes = "/data/classes.json"
  config.eval.features.train_dir = "/data/features"
  assert _names(model, config) == expected


def test_retrieval_has_data_of_its_own():
  config = base.clip_config()
  config.eval.retrieval.dir = "/data/karpathy"
  assert _names(QUERIES, config) == ["RetrievalEvaluator"]
