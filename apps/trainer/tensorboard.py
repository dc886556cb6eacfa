"""Event file of scalars for TensorBoard, written in the calling thread.

`tensorboardX.SummaryWriter` writes in a background thread. If that thread cannot write, it prints a
traceback, and the program waits for it forever once ten scalars are queued.
"""

from collections.abc import Mapping
import os
from pathlib import Path
import time

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ov_data import fs

_FLUSH_SECONDS = 30.0


class EventFile:
  """A new event file in a folder."""

  def __init__(self, folder: Path, *, first_step: int | None = None):
    """Open the file.

    Args:
      folder: created if missing.
      first_step: step from which TensorBoard hides the values of earlier files.

    Raises:
      OSError: the file cannot be written; the message names the folder.
    """
    self._folder, self._flushed = str(folder), time.monotonic()
    with fs.writing(self._folder):
      folder.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
      if first_step is not None:
        self._write(Event(step=first_step, file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Write the scalars of a step.

    Raises:
      OSError: the file cannot be written; the message names the folder.
    """
    with fs.writing(self._folder):
      for name, value in values.items():
        self._write(Event(step=step, summary=summary.scalar(name, value)))
    if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Wait until the file is on the disk."""
    with fs.writing(self._folder):
      self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    """Flush and close the file."""
    with fs.writing(self._folder):
      self._writer.close()

  def _write(self, event: Event) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
