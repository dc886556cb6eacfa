"""Training history: which steps ran in which stage with which batch size.

The number of examples seen and the position in the data follow from it. Both are saved with every
checkpoint and compared with the history when it is restored, so changes of `batch_size` or
`total_steps` on resume never change what was counted before.
"""

from collections.abc import Sequence
import dataclasses
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]  # exact in every JSON reader


@dataclasses.dataclass(frozen=True)
class Span:
  """Consecutive steps of one stage with one batch size.

  Attributes:
    stage: name of the stage.
    first_step: steps of the run before this span.
    examples: examples seen by the run before this span.
    position: examples read of the stage's data before this span.
    batch_size: examples per step.
  """

  stage: str
  first_step: Count
  examples: Count
  position: Count
  batch_size: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


class History:
  """The spans of a run so far, oldest first."""

  def __init__(self, spans: Sequence[Span] = ()):
    """Validate and store `spans`.

    Raises:
      ValueError: the spans contradict each other.
    """
    self._spans = list(spans)
    for before, after in zip(self._spans, self._spans[1:]):
      examples, position = _at(before, after.first_step)
      same_stage = before.stage == after.stage
      if (
        after.first_step < before.first_step
        or after.examples != examples
        or after.position != (position if same_stage else 0)
      ):
        raise ValueError(f"its history is inconsistent after step {after.first_step}")

  @property
  def spans(self) -> tuple[Span, ...]:
    return tuple(self._spans)

  def begin(self, stage: str, step: int, batch_size: int) -> None:
    """Add the steps of `stage` that follow `step`.

    Args:
      stage: name of the stage.
      step: completed steps of the run.
      batch_size: examples per step from here on.
    """
    examples = position = 0
    if self._spans:
      last = self._spans[-1]
      examples, position = _at(last, step)
      if last.stage != stage:
        position = 0
      elif last.batch_size == batch_size:
        return
      if last.first_step == step:  # the span has no steps
        self._spans.pop()
    self._spans.append(Span(stage, step, examples, position, batch_size))

  def examples(self, step: int) -> int:
    """Return the number of examples seen in the first `step` steps of the run."""
    return _at(self._span(step), step)[0] if self._spans else 0

  def position(self, step: int) -> int:
    """Return the number of examples read from the data of the stage that ran step `step`."""
    return _at(self._span(step), step)[1] if self._spans else 0

  def first_step(self, stage: str) -> int | None:
    """Return the number of steps before `stage`; None if the history does not contain it."""
    return next((s.first_step for s in self._spans if s.stage == stage and s.position == 0), None)

  def _span(self, step: int) -> Span:
    """Return the span that ran step `step`, counted from 1; the first span for step 0."""
    ran = [span for span in self._spans if span.first_step < step]
    return ran[-1] if ran else self._spans[0]


def _at(span: Span, step: int) -> tuple[int, int]:
  """Return the examples seen and the position after `step` steps of the run."""
  done = (step - span.first_step) * span.batch_size
  return span.examples + done, span.position + done
