"""Host health: reports stragglers, and stops all processes when one dies.

Every process posts a heartbeat to the board of `ov_sharding` every two seconds, in a thread: its
step, current phase, time spent in each phase, and its error, if any. Process 0 reads the heartbeats
and posts how the run ends, once it does. Nothing of this is on the path of a step.

A dead process is detected in one of three ways:
  - a collective raises an error, as between CPUs. A process without a heartbeat for 6 s is dead;
  - all processes hang. The runtime of JAX misses the process after `gone_after` seconds, prints a
    stack and aborts the others with SIGABRT. This module prints one more line;
  - process 0 dies. The runtime detects this at once from its socket and aborts the others.
Every process then prints one line that names the dead process, and exits with the code GONE, on
which launchers restart all processes. A process that fails with an error stops the others in the
same way; for a user error with the exit code of that error.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from absl import logging
import jax

from apps.trainer.errors import TEMPORARY_FAILURE, exit_code, program, report, run_errors
from apps.trainer.hooks import STARTING, Hook
from apps.trainer.slow_hosts import Beat, SlowHosts
from apps.trainer.startup import printable
import ov_sharding

if TYPE_CHECKING:
  from apps.trainer.run import Run

GONE = TEMPORARY_FAILURE  # exit code: another process died or failed
_BEAT = 2.0  # seconds
_SHORT_BEAT = 0.5  # seconds, until all processes have reported, and at the end of this process
_DEAD_AFTER = 3 * _BEAT  # seconds without a heartbeat, counted once another error is known
# Exit codes that all processes share: user error, Ctrl-C, SIGTERM.
_SHARED_CODES = (2, 130, 143)
# Errors that a process gets because another one died. All others count as its own.
_LOST_PEER = re.compile(
  r"gloo|nccl|connection (closed|reset|refused)|socket closed|coordination|heartbeat|unavailable",
  re.IGNORECASE,
)


class ExitReason(NamedTuple):
  """End of a run: a one-line text and the process that caused it."""

  kind: str  # done | gone | failed
  process: int
  text: str
  code: int


def decide_exit(
  beats: dict[int, Beat], silent: dict[int, float], count: int, since: float | None
) -> ExitReason | None:
  """Return how a run of `count` processes ends; None while it continues.

  Args:
    beats: last heartbeat of each process that has posted one.
    silent: seconds since the last heartbeat of each process.
    count: number of processes.
    since: seconds since the first failure was detected; None without a failure.
  """
  if len(beats) == count and all(beat.done for beat in beats.values()):
    return ExitReason("done", 0, "", 0)
  failed = {i: beat for i, beat in beats.items() if beat.failed is not None}
  if since is None:
    return None
  for i in range(count):
    ended = i in beats and (beats[i].done or i in failed)
    if not ended and silent[i] >= _DEAD_AFTER:
      return ExitReason("gone", i, f"no heartbeat for {silent[i]:.0f} s", GONE)
  if len(failed) < count and since < _DEAD_AFTER + _BEAT:
    return None  # wait until silent processes are known
  own = {i: beat for i, beat in failed.items() if not _LOST_PEER.search(beat.failed or "")}
  first = min(own or failed)
  code = failed[first].code
  return ExitReason(
    "failed", first, failed[first].failed or "", code if code in _SHARED_CODES else GONE
  )


class Hosts(Hook):
  """Monitor of the processes of a run, a context manager; does nothing for a single process.

  Attributes:
    last_checkpoint: function that returns the step of the newest complete checkpoint, for errors.
  """

  def __init__(
    self,
    log: Callable[[str], None],
    *,
    workdir: str = "the workdir",
    slow_after: float = 60.0,
    gone_after: float = 30.0,
  ):
    """Read the process count; the thread starts with the context.

    Args:
      log: function that prints one line; used by process 0.
      workdir: path of the workdir, for errors that name no path.
      slow_after: seconds that a process may delay the others before it is reported.
      gone_after: heartbeat timeout that was passed to `ov_sharding.initialize`.
    """
    self.last_checkpoint: Callable[[], int | None] = lambda: None
    self._log, self._workdir, self._gone_after = log, workdir, gone_after
    self._board = ov_sharding.board()
    self._me, self._count = jax.process_index(), jax.process_count()
    self._slow = SlowHosts(slow_after)
    self._step, self._phase, self._since = 0, STARTING, time.monotonic()
    self._spent: dict[str, float] = {}
    self._failed: str | None = None
    self._error: BaseException | None = None
    self._done = False
    self._names: dict[int, str] = {}
    self._heard: dict[int, tuple[int, float]] = {}  # number of the last beat, time of arrival
    self._trouble: float | None = None  # time of the first failure
    self._suspect: int | None = None
    self._wake, self._ended = threading.Event(), threading.Event()

  def at(self, step: int, phase: str) -> None:
    """Record the step and the phase of this process.

    Args:
      step: number of dispatched steps of the run.
      phase: short description; phases that wait for devices are listed in slow_hosts.
    """
    now = time.monotonic()
    spent = {**self._spent, self._phase: self._spent.get(self._phase, 0.0) + now - self._since}
    self._step, self._phase, self._since, self._spent = step, phase, now, spent

  def on_start(self, run: "Run") -> None:
    """Register the last checkpoint of the run for error messages."""
    self.last_checkpoint = run.checkpoints.finished_step

  def on_phase(self, stage: str, step: int, phase: str) -> None:
    """Report step and phase to the other processes."""
    self.at(step, phase)

  def on_error(self, error: BaseException) -> None:
    """Report the exception to the other processes."""
    self._fail(error)

  @contextlib.contextmanager
  def report_errors(self) -> Iterator[None]:
    """Report an exception of the block to the other processes before anything waits for them.

    Errors of the machine, such as a full disk, are converted to UserError; see `run_errors`.
    """
    try:
      with run_errors(self._workdir, lambda: self.last_checkpoint()):
        yield
    except BaseException as error:
      self._fail(error)
      raise

  def __enter__(self) -> Self:
    if self._board is not None:
      _on_abort(self._on_runtime_abort)
      threading.Thread(target=self._watch, args=(self._board,), daemon=True).start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._board is None:
      return
    if error is not None:
      self._fail(error)
      # The thread ends the process; this timeout covers the case that it cannot.
      self._ended.wait(2 * self._gone_after + 60)
      _exit(report(error))
    self._done = True
    self._wake.set()
    self._ended.wait()  # processes that fail now are still reported
    _on_abort(None)  # the handler cannot run Python code during interpreter shutdown

  def _fail(self, error: BaseException) -> None:
    if self._failed is None:
      self._error = error
      self._failed = " ".join(str(error).split())[:1000] or type(error).__name__
      self._wake.set()

  def _beat(self, number: int) -> Beat:
    code = 0 if self._error is None else exit_code(self._error)
    spent = {**self._spent, self._phase: self._spent.get(self._phase, 0.0)}
    spent[self._phase] += time.monotonic() - self._since
    return Beat(
      socket.gethostname(), number, self._step, self._phase, spent, self._failed, code, self._done
    )

  def _watch(self, board: ov_sharding.Board) -> None:
    """Post heartbeats until the run ends, and exit the process if the run fails."""
    try:
      for number in range(sys.maxsize):
        end = None
        with contextlib.suppress(ConnectionError):  # handled by the runtime of JAX
          end = self._exchange(board, number)
        if end is not None:
          self._finish(board, end)
          return
        self._wake.wait(_BEAT if len(self._names) == self._count else _SHORT_BEAT)
        if self._wake.is_set():
          time.sleep(_SHORT_BEAT)
    finally:
      self._ended.set()

  def _exchange(self, board: ov_sharding.Board, number: int) -> ExitReason | None:
    board.put(f"hosts/{self._me}", json.dumps(self._beat(number)))
    if len(self._names) < self._count:
      found = board.items("hosts").items()
      self._names = {int(i): json.loads(text)[0] for i, text in found}
    return self._lead(board) if self._me == 0 else self._follow(board)

  def _lead(self, board: ov_sharding.Board) -> ExitReason | None:
    """Evaluate the heartbeats of all processes; runs on process 0."""
    now = time.monotonic()
    beats = {int(i): Beat(*json.loads(text)) for i, text in board.items("hosts").items()}
    for i in range(self._count):
      number = beats[i].number if i in beats else -1
      if i not in self._heard or self._heard[i][0] != number:
        self._heard[i] = number, now
    silent = {i: now - heard for i, (_, heard) in self._heard.items()}
    if self._trouble is None and any(beat.failed is not None for beat in beats.values()):
      self._trouble = now
    since = None if self._trouble is None else now - self._trouble
    end = decide_exit(beats, silent, self._count, since)
    if end is None and since is None:
      for line in self._slow.observe(now, beats):
        self._log(line)
    absent = [i for i in silent if silent[i] >= _DEAD_AFTER and not (i in beats and beats[i].done)]
    self._suspect = max(absent, key=silent.__getitem__) if absent else None
    board.put("word", json.dumps({"end": end, "suspect": self._suspect}))
    return end

  def _follow(self, board: ov_sharding.Board) -> ExitReason | None:
    word = json.loads(board.get("word") or "{}")
    self._suspect = word.get("suspect")
    return ExitReason(*word["end"]) if word.get("end") else None

  def _finish(self, board: ov_sharding.Board, end: ExitReason) -> None:
    if end.kind == "done":
      return
    with contextlib.suppress(ConnectionError):
      board.put(f"read/{self._me}", "")
    error = self._error
    own = error is not None and (end.process == self._me or not _LOST_PEER.search(str(error)))
    if own and error is not None and end.kind == "failed":
      code = report(error)
    else:
      what = "is gone" if end.kind == "gone" else "failed"
      self._print_error(f"{self._name(end.process)} {what}: {end.text}")
      code = end.code
    if self._me == 0:  # the board ends with this process
      readers, deadline = self._count - (end.kind == "gone"), time.monotonic() + 2.5 * _BEAT
      while len(board.items("read")) < readers and time.monotonic() < deadline:
        time.sleep(0.1)
    _exit(code)

  def _on_runtime_abort(self) -> None:
    """Report why the runtime of JAX aborts this process; runs in a separate thread."""
    if self._suspect is not None:
      missed = f"no heartbeat for {self._gone_after:.0f} s"
      self._print_error(f"{self._name(self._suspect)} is gone: {missed}")
    elif self._me != 0 and self._board is not None and not self._board.reachable():
      host, port = self._board.address
      self._print_error(f"{self._name(0)} is gone: nothing listens at {host}:{port}")
    else:
      self._print_error("the runtime of JAX ended this process; see its log lines above")
    _exit(GONE)

  def _name(self, process: int) -> str:
    host = self._names.get(process)
    return f"process {process} ({host})" if host else f"process {process}"

  def _print_error(self, what: str) -> None:
    step = _within(5.0, self.last_checkpoint)
    saved = f"last checkpoint: step {step:,}; " if step is not None else ""
    advice = "start all processes again with the same command, as launchers do"
    line = printable(f"{program()}: error: {what}; {saved}{advice}")
    print(line, file=sys.stderr, flush=True)


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
  """Return the result of `ask`; None on timeout or error, as for an unreachable bucket."""
  found: list[Any] = []

  def run() -> None:
    try:
      found.append(ask())
    except Exception as error:
      logging.warning("last checkpoint: %s", error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  return found[0] if found else None


def _exit(code: int) -> None:
  """Exit at once: a normal exit would wait for processes that are dead."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


_abort_handler: Any = None  # keeps the handler alive while C code may call it


def _on_abort(act: Callable[[], None] | None) -> None:
  """Call `act` when C++ code aborts this process; None removes the handler.

  The `signal` module cannot do this: it runs handlers later in the main thread, and abort() does
  not wait. The aborting thread waits for the GIL, which other threads release while they wait for
  devices or for the board.
  """
  global _abort_handler
  library = ctypes.CDLL(None)
  library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  library.signal.restype = ctypes.c_void_p
  if act is None:
    library.signal(int(signal.SIGABRT), None)  # SIG_DFL is 0
    return
  wanted = act
  _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: wanted())
  library.signal(int(signal.SIGABRT), ctypes.cast(_abort_handler, ctypes.c_void_p))
