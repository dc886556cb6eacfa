"""Table of evaluators, with their requirements on model and configuration."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools

from apps.caption_eval import CaptionGenerator, CaptionLikelihood, LikelihoodClassifier
from apps.clip_eval import RetrievalEvaluator, ZeroShotEvaluator
from apps.feature_eval import FeatureEvaluator
from apps.suite_eval import SuiteEvaluator
from apps.trainer.held_out import HeldOut
from apps.trainer.run_config import RunConfig
from apps.trainer.task import Evaluation, Params
import ov_models

Evaluator = Callable[[Params], Evaluation]


@dataclasses.dataclass(frozen=True)
class Evaluators:
  """Runs several evaluators; compiled once, called with the params of any step."""

  parts: Sequence[Evaluator]

  def __call__(self, params: Params) -> Evaluation:
    found = [evaluate(params) for evaluate in self.parts]
    return Evaluation(
      tuple(itertools.chain.from_iterable(e.results for e in found)),
      samples=tuple(itertools.chain.from_iterable(e.samples for e in found)),
      attribute_words=tuple(itertools.chain.from_iterable(e.attribute_words for e in found)),
      classes=next((e.classes for e in found if e.classes is not None), None),
      galleries=tuple(itertools.chain.from_iterable(e.galleries for e in found)),
      files={path: text for e in found for path, text in e.files.items()},
    )


@dataclasses.dataclass(frozen=True)
class Entry:
  """An evaluator and its requirements.

  Attributes:
    make: function that opens the data and returns the evaluator.
    model: whether the model supports the evaluator.
    data: whether the configuration enables the evaluator and names its data.
  """

  make: Callable[[HeldOut], Evaluator]
  model: Callable[[ov_models.VisionLanguageConfig], bool]
  data: Callable[[RunConfig], bool]


def _pairs(config: RunConfig) -> bool:
  return bool(config.input.eval_data_dir)


def _classes(config: RunConfig) -> bool:
  return bool(config.eval.zero_shot.classes)


# In the order of execution. To add an evaluator, write a module and add it here.
EVALUATORS: tuple[Entry, ...] = (
  Entry(CaptionLikelihood, lambda model: model.decoder is not None, _pairs),
  Entry(
    CaptionGenerator,
    lambda model: model.can_generate,
    lambda config: _pairs(config) and config.eval.caption_examples > 0,
  ),
  Entry(ZeroShotEvaluator, lambda model: model.can_embed_text, _classes),
  Entry(
    LikelihoodClassifier,
    lambda model: model.can_generate and not model.can_embed_text,
    _classes,
  ),
  Entry(
    RetrievalEvaluator,
    lambda model: model.can_embed_text,
    lambda config: _pairs(config) or bool(config.eval.retrieval.dir),
  ),
  Entry(FeatureEvaluator, lambda model: True, lambda config: bool(config.eval.features.train_dir)),
  # Raises for a model without a text tower, so that a suite is never skipped silently.
  Entry(SuiteEvaluator, lambda model: True, lambda config: bool(config.eval.suite)),
)


def make_evaluators(held_out: HeldOut) -> Evaluators | None:
  """Return the evaluators that the model supports and `config.eval` has data for, or None.

  Raises:
    ValueError: the data are invalid, or the classes do not fit them.
  """
  config, model = held_out.config, held_out.task.model
  parts = [e.make(held_out) for e in EVALUATORS if e.model(model) and e.data(config)]
  return Evaluators(parts) if parts else None
