"""What the trainer asks of a task; an app brings one."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from apps.trainer.report import ClassTable, Sample
from apps.trainer.step import LossOutput
import ov_eval

Params = Any  # nested dict of arrays


class Task(Protocol):
  """A model with its loss. Knows no optimizer, mesh, file or loop."""

  @property
  def image_size(self) -> int:
    """Pixels of the square pictures the model takes."""

  @property
  def text_len(self) -> int:
    """Tokens of each text."""

  @property
  def flops_per_example(self) -> float:
    """Model FLOPs of forward and backward for one example."""

  def init(self, key: jax.Array) -> Params:
    """Fresh params; works under jit."""

  def abstract_params(self) -> Params:
    """Shapes and dtypes of params."""

  def logical_axes(self) -> Params:
    """The tree of params with a tuple of logical axis names for each."""

  def loss(self, params: Params, batch: dict[str, jax.Array], key: jax.Array) -> LossOutput:
    """Loss of a batch whose images are normalised float32."""


class Evaluation(NamedTuple):
  """What an evaluation found.

  Attributes:
    results: figures; each becomes `eval/<name>` in metrics.jsonl.
    samples: pictures with captions for the report.
    attribute_words: words of the samples to mark as right or wrong.
    classes: confusion of a zero-shot classification.
  """

  results: tuple[ov_eval.Result, ...]
  samples: tuple[Sample, ...] = ()
  attribute_words: tuple[str, ...] = ()
  classes: ClassTable | None = None


Evaluate = Callable[[Params], Evaluation]
