"""What the trainer asks of a task; an app brings one."""

from typing import Any, NamedTuple, Protocol

import jax

Params = Any  # nested dict of arrays


class LossOutput(NamedTuple):
  """Result of a task's loss on one (micro-)batch."""

  loss: jax.Array  # float32 scalar, a mean
  weight: jax.Array  # float32 scalar, how many things the mean is over
  metrics: dict[str, jax.Array]  # float32 scalars, means over the same things


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
