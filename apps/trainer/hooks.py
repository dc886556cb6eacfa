"""Hooks: callbacks for the events of the training loop.

Host health, compile cache and report are hooks. All hooks are called on every process, in order,
in the thread of the loop.
"""

from collections.abc import Iterator, Sequence
import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from apps.trainer.stages import Stage
  from apps.trainer.task import Evaluation

# Phases of a run.
STARTING = "starting"
INPUT = "waiting for input"
COMPILING = "compiling"
STEP = "in a step"
EVALUATING = "evaluating"
SAVING = "saving"


class Hook:
  """Base class of hooks; every method does nothing. Steps are completed steps of the run."""

  def on_start(self, run: Any) -> None:
    """Handle the start of the run, before the first stage.

    Args:
      run: the run, a `run.Run`.
    """

  def on_phase(self, stage: str, step: int, phase: str) -> None:
    """Handle a new phase of the process; `stage` is the name of the stage."""

  def on_step(self, step: int) -> None:
    """Handle a dispatched step."""

  def on_eval(self, stage: "Stage", step: int, evaluation: "Evaluation") -> None:
    """Handle an evaluation that was written to metrics.jsonl."""

  def on_end(self) -> None:
    """Handle the end of an uninterrupted run."""

  def on_error(self, error: BaseException) -> None:
    """Handle an exception, before anything outside waits for other processes."""


class Hooks(Hook):
  """Sequence of hooks that acts as one hook."""

  def __init__(self, hooks: Sequence[Hook] = ()):
    self._hooks = list(hooks)
    self._now = ("", 0, STARTING)

  def add(self, hook: Hook) -> None:
    """Append a hook."""
    self._hooks.append(hook)

  def on_start(self, run: Any) -> None:
    """See Hook."""
    for hook in self._hooks:
      hook.on_start(run)

  def on_phase(self, stage: str, step: int, phase: str) -> None:
    """See Hook."""
    self._now = (stage, step, phase)
    for hook in self._hooks:
      hook.on_phase(stage, step, phase)

  def on_step(self, step: int) -> None:
    """See Hook."""
    for hook in self._hooks:
      hook.on_step(step)

  def on_eval(self, stage: "Stage", step: int, evaluation: "Evaluation") -> None:
    """See Hook."""
    for hook in self._hooks:
      hook.on_eval(stage, step, evaluation)

  def on_end(self) -> None:
    """See Hook."""
    for hook in self._hooks:
      hook.on_end()

  def on_error(self, error: BaseException) -> None:
    """See Hook."""
    for hook in self._hooks:
      hook.on_error(error)

  @contextlib.contextmanager
  def waiting_for_input(self) -> Iterator[None]:
    """Enter the phase INPUT within a block, then restore the previous phase."""
    stage, step, phase = self._now
    self.on_phase(stage, step, INPUT)
    yield
    self.on_phase(stage, step, phase)

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    """Call `on_error` for exceptions of a block."""
    try:
      yield
    except BaseException as error:
      self.on_error(error)
      raise
