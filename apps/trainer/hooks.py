"""What a run does next to training: hooks get the events of the loop, which knows none by name.

Host health, compile cache and report are hooks. All are called on every process, one after the
other, in the thread of the loop.
"""

from collections.abc import Iterator, Sequence
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from apps.trainer.run import Run
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
  """Base of hooks; every method does nothing. Steps are those of the run that are done."""

  def on_start(self, run: "Run") -> None:
    """Act before the first stage."""

  def on_phase(self, stage: str, step: int, phase: str) -> None:
    """Act when the process enters a phase; `stage` is a name."""

  def on_step(self, step: int) -> None:
    """Act after a step was given to the devices."""

  def on_eval(self, stage: "Stage", step: int, evaluation: "Evaluation") -> None:
    """Act after an evaluation was written to metrics.jsonl."""

  def on_end(self) -> None:
    """Act after the last stage of a run that nothing stopped."""

  def on_error(self, error: BaseException) -> None:
    """Act on an exception, before anything outside waits for other processes."""


class Hooks(Hook):
  """Several hooks as one."""

  def __init__(self, hooks: Sequence[Hook] = ()):
    self._hooks = list(hooks)
    self._now = ("", 0, STARTING)

  def add(self, hook: Hook) -> None:
    """Call this hook too, after the others."""
    self._hooks.append(hook)

  def on_start(self, run: "Run") -> None:
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
    """Enter the phase INPUT for a block, and the phase before it afterwards."""
    stage, step, phase = self._now
    self.on_phase(stage, step, INPUT)
    yield
    self.on_phase(stage, step, phase)

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    """Call `on_error` for an exception of a block."""
    try:
      yield
    except BaseException as error:
      self.on_error(error)
      raise
