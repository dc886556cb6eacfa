"""Stopping on request: a run ends at the next step, after a checkpoint.

SIGTERM asks for it, Ctrl-C, and Google Compute Engine, where it is about to take a machine away.
"""

from collections.abc import Callable
import contextlib
import http.client
import os
import signal
import socket
import threading
from types import FrameType
from typing import Any, Self
import urllib.request

from absl import logging
import jax
from jax.experimental import multihost_utils

import ov_sharding

_WHY = "stop"  # key of the board
_POLL = 2.0  # seconds; a preempted machine has 30
# What the metadata server of Google Compute Engine says of an instance, and what ends it. A machine
# that migrates goes on after a pause.
_NOTICES = {"maintenance-event": "TERMINATE", "preempted": "TRUE"}


class StopRequest:
  """A context manager that turns requests to stop into a question to ask before each step.

  A second Ctrl-C ends the process at once. With several processes SIGTERM on any of them stops
  all at the same step: JAX's own preemption service listens for it, and agrees on the step. A
  notice of Google Compute Engine becomes SIGTERM to the process that read it.
  """

  def __init__(self) -> None:
    self._board = ov_sharding.board()
    self._signal: int | None = None
    self._why: str | None = None
    self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    self._over = threading.Event()

  def requested(self, step: int) -> str | None:
    """What asks to stop before `step`, if anything does; on every process or on none."""
    if jax.process_count() > 1:
      if not multihost_utils.reached_preemption_sync_point(step):
        return None
      self._signal = signal.SIGTERM
      return (self._board and self._board.get(_WHY)) or "SIGTERM"
    return (self._why or signal.Signals(self._signal).name) if self._signal else None

  @property
  def exit_code(self) -> int:
    """0, or that of a program which a signal ended: whoever started it sees that it is not done."""
    return 128 + self._signal if self._signal else 0

  def __enter__(self) -> Self:
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._note)
    server = metadata_server()
    if server is not None:
      threading.Thread(target=self._listen, args=(server,), daemon=True).start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._over.set()
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._signal = number
    signal.signal(number, self._old[number])  # a second one acts as usual

  def _listen(self, server: str) -> None:
    """The thread: asks for notices until there is a new one, or the run is over.

    One that is there at the start has stopped the run before; machines with GPUs get it an hour
    ahead, and go on until then.
    """
    known = read_notices(server) or set()
    while not self._over.wait(_POLL):
      notices = read_notices(server)
      if notices is None:
        continue
      if not notices - known:
        known = notices
        continue
      notice = min(notices - known)
      logging.warning("%s on %s: stops after a checkpoint", notice, socket.gethostname())
      self._why = notice
      if self._board is not None:
        self._why = f"{notice} on {socket.gethostname()}"
        with contextlib.suppress(ConnectionError):  # then the runtime of jax ends this process
          self._board.put(_WHY, self._why)
      if not self._over.is_set():  # afterwards nobody listens for the signal
        os.kill(os.getpid(), signal.SIGTERM)
      return


def metadata_server() -> str | None:
  """Where to ask for notices: host or host:port; None outside Google Compute Engine.

  GCE_METADATA_HOST names another, as for Google's own libraries.
  """
  default = "metadata.google.internal" if ov_sharding.is_google_host() else None
  return os.environ.get("GCE_METADATA_HOST") or default


def read_notices(server: str) -> set[str] | None:
  """Why this machine is about to end, such as `preempted TRUE`; None where nobody answers."""
  found = set()
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  for name, ending in _NOTICES.items():
    request = urllib.request.Request(
      f"http://{server}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
    )
    try:
      with direct.open(request, timeout=5) as answer:
        value = answer.read(100).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:  # it is asked again
      logging.debug("no answer about %s: %s", name, error)
      return None
    if value.startswith(ending):
      found.add(f"{name} {value}")
  return found
