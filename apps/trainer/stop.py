"""Stopping on request: SIGTERM and Ctrl-C end a run at the next step, after a checkpoint."""

from collections.abc import Callable
import signal
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """A context manager that turns SIGTERM or Ctrl-C into a question to ask before each step.

  A second Ctrl-C ends the process at once. With several processes SIGTERM on any of them stops
  all at the same step: JAX's own preemption service listens for it, and agrees on the step.
  """

  def __init__(self) -> None:
    self._signal: int | None = None
    self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

  def requested(self, step: int) -> str | None:
    """What asks to stop before `step`, if anything does; the same on every process."""
    if jax.process_count() > 1:
      return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
    return signal.Signals(self._signal).name if self._signal else None

  def __enter__(self) -> Self:
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._note)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._signal = number
    signal.signal(number, self._old[number])  # a second one acts as usual
