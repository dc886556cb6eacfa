"""Which evaluators a model and a configuration have data for, run one after the other."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools

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


def make_evaluators(held_out: HeldOut) -> Evaluators | None:
  """Every evaluator that `config.eval` has data for and the model can do; None for none.

  Raises:
    ValueError: data that cannot be used, or classes that do not fit them.
  """
  config, model = held_out.config, held_out.task.model
  pairs = bool(config.input.eval_data_dir)
  text_tower = getattr(model, "text", None) is not None
  writes = isinstance(model.decoder, ov_models.DecoderConfig)  # token by token
  classes = bool(config.eval.zero_shot.classes)
  wanted: list[tuple[bool, Callable[[HeldOut], Evaluator]]] = [
    (pairs and model.decoder is not None, CaptionLikelihood),
    (pairs and writes and config.eval.caption_examples > 0, CaptionWriter),
    (classes and text_tower, ZeroShotEvaluator),
    (classes and writes and not text_tower, LikelihoodClassifier),
    (text_tower and (pairs or bool(config.eval.retrieval.dir)), RetrievalEvaluator),
    (bool(config.eval.features.train_dir), FeatureEvaluator),
  ]
  parts = [make(held_out) for is_wanted, make in wanted if is_wanted]
  return Evaluators(parts) if parts else None
