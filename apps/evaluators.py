"""Which evaluators a model and a configuration have data for, run one after the other."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools

from ml_collections import ConfigDict

from apps.caption_eval import CaptionLikelihood, CaptionWriter, LikelihoodClassifier
from apps.clip_eval import RetrievalEvaluator, ZeroShotEvaluator
from apps.feature_eval import FeatureEvaluator
from apps.trainer.held_out import HeldOut
from apps.trainer.task import Evaluation, Params
import ov_models

Evaluator = Callable[[Params], Evaluation]


@dataclasses.dataclass(frozen=True)
class Evaluators:
  """Evaluators as one; compiled once, called with the params of any step."""

  parts: Sequence[Evaluator]

  def __call__(self, params: Params) -> Evaluation:
    found = [evaluate(params) for evaluate in self.parts]
    return Evaluation(
      tuple(itertools.chain.from_iterable(e.results for e in found)),
      samples=tuple(itertools.chain.from_iterable(e.samples for e in found)),
      attribute_words=tuple(itertools.chain.from_iterable(e.attribute_words for e in found)),
      classes=next((e.classes for e in found if e.classes is not None), None),
      galleries=tuple(itertools.chain.from_iterable(e.galleries for e in found)),
    )


@dataclasses.dataclass(frozen=True)
class Entry:
  """An evaluator and what it needs.

  Attributes:
    make: opens its data and returns it.
    model: whether a model can do what it evaluates.
    data: whether the configuration of a run names its data and wants it.
  """

  make: Callable[[HeldOut], Evaluator]
  model: Callable[[ov_models.VisionLanguageConfig], bool]
  data: Callable[[ConfigDict], bool]


def _pairs(config: ConfigDict) -> bool:
  return bool(config.input.eval_data_dir)


def _classes(config: ConfigDict) -> bool:
  return bool(config.eval.zero_shot.classes)


# In the order in which they run. A new evaluator is a module and a line here.
EVALUATORS: tuple[Entry, ...] = (
  Entry(CaptionLikelihood, lambda model: model.decoder is not None, _pairs),
  Entry(
    CaptionWriter,
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
)


def make_evaluators(held_out: HeldOut) -> Evaluators | None:
  """Return the evaluators that `config.eval` has data for and the model can do; None for none.

  Raises:
    ValueError: data that cannot be used, or classes that do not fit them.
  """
  config, model = held_out.config, held_out.task.model
  parts = [e.make(held_out) for e in EVALUATORS if e.model(model) and e.data(config)]
  return Evaluators(parts) if parts else None
