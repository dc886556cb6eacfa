"""Progress bar with rate and remaining time; one line every 15 seconds if output is not a TTY."""

import threading
import time
from typing import Self

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  Task,
  TextColumn,
  TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 15.0


class Counter:
  """Thread-safe counter of examples with a known total."""

  def __init__(self, what: str, total: int, console: Console | None = None):
    self._what, self._total, self._done = what, total, 0
    self._console = console or Console(stderr=True, highlight=False)
    self._lock = threading.Lock()
    self._started = self._last_line = time.monotonic()
    self._bar = Progress(
      TextColumn(what, markup=False),
      BarColumn(),
      MofNCompleteColumn(),
      _Rate(),
      TimeRemainingColumn(),
      console=self._console,
    )
    self._task = self._bar.add_task(what, total=total)

  def __enter__(self) -> Self:
    if self._console.is_terminal:
      self._bar.start()
    return self

  def __call__(self, count: int) -> None:
    with self._lock:
      self._done += count
      now = time.monotonic()
      if self._console.is_terminal:
        self._bar.update(self._task, completed=self._done)
      elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
        self._last_line = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate if rate else float("nan")
        self._console.print(
          f"{self._what}  {self._done:,}/{self._total:,}  {rate:,.0f}/s  {left:,.0f} s left",
          markup=False,
        )

  def __exit__(self, *exc_info: object) -> None:
    if self._console.is_terminal:
      self._bar.stop()


class _Rate(ProgressColumn):
  def render(self, task: Task) -> Text:
    return Text(f"{task.speed:,.0f}/s" if task.speed else "")
