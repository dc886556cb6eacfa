"""Terminal output of a run: a line per phase, a progress bar per stage; plain lines in files."""

from collections.abc import Callable, Iterator
import contextlib
import math
import sys
import time
from typing import IO, Self

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from apps.trainer.startup import printable


class Terminal:
  """Terminal of a run; silent on all processes except process 0."""

  def __init__(self, *, active: bool = True, file: IO[str] | None = None, every: float = 30.0):
    """Configure the output; prints nothing.

    Args:
      active: False disables all output.
      file: output file; standard error by default.
      every: seconds between lines of progress if the output is not a terminal.
    """
    self._console = Console(file=file or sys.stderr, highlight=False, quiet=not active)
    self._started = time.monotonic()
    self._every = every

  def phase(self, text: str) -> None:
    """Print the phase that begins now, so that the last line of a stuck job shows its phase."""
    seconds = time.monotonic() - self._started
    line = f"[{seconds:7.1f} s] {printable(text)}"
    self._console.print(line, markup=False, soft_wrap=True)

  def stage(self, name: str, *, step: int, first_step: int, last_step: int) -> "StageProgress":
    """Return the progress of a stage as a context manager; steps count over the whole run."""
    return StageProgress(self._console, name, step, first_step, last_step, self._every)

  @contextlib.contextmanager
  def count(self, name: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar for counted work.

    Yields:
      A function that takes the number of newly completed items and, if `total` was unknown, the
      total.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    shown = self._console.is_terminal and not self._console.quiet
    with Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not shown) as bar:
      task = bar.add_task(printable(name), total=total or None)
      yield lambda more, total=None: bar.update(task, advance=more, total=total)


class StageProgress:
  """Progress of a stage: a bar on terminals, otherwise a line every few seconds."""

  def __init__(
    self, console: Console, name: str, step: int, first_step: int, last_step: int, every: float
  ):
    self._console = console
    self._name = name = printable(name)
    self._first_step = first_step
    self._last_step = last_step
    self._every = every
    self._begun: tuple[float, int] | None = None  # time and step of the first update
    self._printed = -math.inf
    self._bar: Progress | None = None
    if console.is_terminal and not console.quiet:
      self._bar_column = BarColumn()
      facts = TextColumn("{task.fields[facts]}", markup=False)
      named = TextColumn("{task.description}", markup=False)  # names may contain {}
      self._bar = Progress(named, self._bar_column, facts, console=console)
      total = last_step - first_step
      self._task = self._bar.add_task(name, total=total, completed=step - first_step, facts="")

  def update(
    self,
    step: int,
    *,
    loss: float,
    images_per_second: float,
    mfu: float | None,
    input_wait: float,
  ) -> None:
    """Show the state after `step`.

    Args:
      step: number of completed steps of the run.
      loss: loss of this step.
      images_per_second: throughput over all devices.
      mfu: model FLOPs utilisation, 0 to 1; None if the peak of the devices is unknown.
      input_wait: fraction of the time spent waiting for input, 0 to 1.
    """
    now = time.monotonic()
    if self._begun is None:
      self._begun = now, step
    eta = self._eta(now, step)
    if self._bar is not None:
      facts = (
        f"{step:,}/{self._last_step:,}  loss {loss:.3f}  {images_per_second:,.0f} img/s  "
        f"mfu {_percent(mfu, 0)}  wait {_percent(input_wait, 0)}  eta {eta}"
      )
      room = self._console.width - len(self._name) - len(facts) - 3
      self._bar_column.bar_width = min(40, max(4, room))
      self._bar.update(self._task, completed=step - self._first_step, facts=facts)
    elif now - self._printed >= self._every or step >= self._last_step:
      self._printed = now
      self._console.print(
        f"{self._name}  step {step:,}/{self._last_step:,}  loss {loss:.4f}  "
        f"{images_per_second:,.0f} img/s  mfu {_percent(mfu, 1)}  "
        f"input wait {_percent(input_wait, 1)}  eta {eta}",
        markup=False,
        soft_wrap=True,
      )

  def _eta(self, now: float, step: int) -> str:
    """Estimate the remaining time from the speed since the first update, pauses included."""
    assert self._begun is not None
    began, first = self._begun
    if step <= first:
      return "-"
    return duration((now - began) / (step - first) * (self._last_step - step))

  def __enter__(self) -> Self:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._bar is not None:
      self._bar.stop()


def _percent(fraction: float | None, digits: int) -> str:
  return "-" if fraction is None else f"{fraction:.{digits}%}"


def duration(seconds: float) -> str:
  """Format a duration, such as 0:00:09, 0:12:03 or 2 d 03:10:00."""
  whole = round(seconds)
  days, rest = divmod(whole, 86400)
  hours, rest = divmod(rest, 3600)
  clock = f"{rest // 60:02d}:{rest % 60:02d}"
  return f"{days} d {hours:02d}:{clock}" if days else f"{hours}:{clock}"
