"""What the trainer asks of a task; an app brings one."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from apps.trainer.gallery import Gallery
from apps.trainer.report import ClassTable, Sample
from apps.trainer.step import Batch, LossOutput
import ov_data
import ov_eval

Params = Any  # nested dict of arrays


class Task(Protocol):
  """A model with its loss. Knows no optimizer, mesh, file or loop.

  One whose loss compares examples with each other also has the methods of `step.TwoPhase`; one
  whose params must stay within limits has that of `step.Projected`.
  """

  @property
  def name(self) -> str:
    """The model in a few characters, such as "Ti/16 + Ti"."""

  @property
  def image_size(self) -> int:
    """Pixels of the square pictures the model takes."""

  @property
  def text_len(self) -> int:
    """Tokens of each text."""

  @property
  def text_specs(self) -> Mapping[str, ov_data.TextSpec] | None:
    """Names and making of the texts of a batch; None: one caption as `ids`, see `Loader`."""

  @property
  def batch_keys(self) -> tuple[str, ...]:
    """The arrays of a batch that go to the devices."""

  @property
  def flops_per_example(self) -> float:
    """Model FLOPs of forward and backward for one example."""

  def text_processor(self, tokenizer: "ov_data.Tokenizer") -> "ov_data.TextProcessor | None":
    """How texts reach a text tower; None for a model without one."""

  def init(self, key: jax.Array) -> Params:
    """Fresh params; works under jit."""

  def abstract_params(self) -> Params:
    """Shapes and dtypes of params."""

  def logical_axes(self) -> Params:
    """The tree of params with a tuple of logical axis names for each."""

  def loss(self, params: Params, batch: Batch, key: jax.Array) -> LossOutput:
    """Loss of a batch whose images are normalised float32."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation found.

  Attributes:
    results: figures; each becomes `eval/<name>` in metrics.jsonl.
    samples: pictures with captions for the report.
    attribute_words: words of the samples to mark as right or wrong.
    classes: confusion of a zero-shot classification.
    galleries: what was found for a text or a picture, for the report.
  """

  results: tuple[ov_eval.Result, ...]
  samples: tuple[Sample, ...] = ()
  attribute_words: tuple[str, ...] = ()
  classes: ClassTable | None = None
  galleries: tuple[Gallery, ...] = ()


Evaluate = Callable[[Params], Evaluation]


def abstract_batch(
  task: Task, rows: int, sharding: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch of `rows` examples as the train step gets it."""
  specs = task.text_specs or {}
  batch = {}
  for key in task.batch_keys:
    shape: tuple[int, ...] = (rows, specs[key].length if key in specs else task.text_len)
    dtype: Any = jnp.int32
    if key == "image":
      shape, dtype = (rows, task.image_size, task.image_size, 3), jnp.uint8
    elif key in ("valid", "index"):
      shape, dtype = (rows,), bool if key == "valid" else jnp.int32
    batch[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return batch
