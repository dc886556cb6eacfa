"""Graceful stop: a run ends at the next step, after a checkpoint.

A stop is requested by SIGTERM, by Ctrl-C, or by a Google Compute Engine preemption notice.
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

_REASON_KEY = "stop"  # key on the board
_POLL = 2.0  # seconds; preempted machines have 30
# Values of the metadata server of Google Compute Engine that announce the end of an instance. A
# machine that migrates continues after a pause.
_NOTICES = {"maintenance-event": "TERMINATE", "preempted": "TRUE"}


class StopRequest:
  """Context manager that collects requests to stop, to be checked before each step.

  A second Ctrl-C ends the process at once. In a multi-process run, SIGTERM on any process stops all
  of them at the same step: JAX's preemption service listens for it and agrees on the step. A
  notice of Google Compute Engine is converted to SIGTERM for the process that read it.
  """

  def __init__(self) -> None:
    self._board = ov_sharding.board()
    self._signal: int | None = None
    self._reason: str | None = None
    self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    self._over = threading.Event()

  def requested(self, step: int) -> str | None:
    """Return the signal or notice that requests a stop before `step`; None without a request.

    The result is the same on every process.
    """
    if jax.process_count() > 1:
      if not multihost_utils.reached_preemption_sync_point(step):
        return None
      self._signal = signal.SIGTERM
      return (self._board and self._board.get(_REASON_KEY)) or "SIGTERM"
    return (self._reason or signal.Signals(self._signal).name) if self._signal else None

  @property
  def exit_code(self) -> int:
    """Return 0, or the exit code of a program ended by a signal if the run was stopped."""
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
    signal.signal(number, self._old[number])  # a second signal has its default effect

  def _listen(self, server: str) -> None:
    """Poll for notices until there is a new one, or the run is over.

    A notice that exists at the start has already stopped the run before. Machines with GPUs receive
    it an hour in advance and continue until then.
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
      self._reason = notice
      if self._board is not None:
        self._reason = f"{notice} on {socket.gethostname()}"
        with contextlib.suppress(ConnectionError):  # then the runtime of JAX ends this process
          self._board.put(_REASON_KEY, self._reason)
      if not self._over.is_set():  # afterwards no handler is installed
        os.kill(os.getpid(), signal.SIGTERM)
      return


def metadata_server() -> str | None:
  """Return host or host:port of the metadata server; None outside Google Compute Engine.

  GCE_METADATA_HOST overrides it, as in Google's libraries.
  """
  default = "metadata.google.internal" if ov_sharding.is_google_host() else None
  return os.environ.get("GCE_METADATA_HOST") or default


def read_notices(server: str) -> set[str] | None:
  """Return why this machine is about to end, such as `preempted TRUE`; None without an answer."""
  found = set()
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  for name, ending in _NOTICES.items():
    request = urllib.request.Request(
      f"http://{server}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
    )
    try:
      with direct.open(request, timeout=5) as answer:
        value = answer.read(100).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:  # polled again later
      logging.debug("no answer about %s: %s", name, error)
      return None
    if value.startswith(ending):
      found.add(f"{name} {value}")
  return found
