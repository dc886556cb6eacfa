"""Host health: reports stragglers, and ends all processes when one dies.

Every process posts a beat to the board of `ov_sharding` every two seconds, in a thread: its step,
what it does, how long it did what, and what it failed with. Process 0 reads the beats and writes
its word back: how the run ends, if it does. Nothing of this is on the path of a step.

How the death of a process is known:
  - a collective raises an error, as between CPUs. Whoever gives no sign of life for 6 s is gone;
  - everything hangs. The runtime of jax misses the process after `gone_after` seconds, and
    ends the others by SIGABRT, with a stack of its own. Ours is the last line after it;
  - process 0 dies. The runtime knows at once from its socket, and does the same.
All end with one line that names the process, and with the exit code GONE, which launchers answer by
starting all again. A process that fails by itself ends the others in the same way; where that is
the user's mistake, with the code for it.
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

from apps.trainer.errors import AGAIN, exit_code, program, report, run_errors
from apps.trainer.hooks import STARTING, Hook
from apps.trainer.slow_hosts import Beat, SlowHosts
from apps.trainer.startup import printable
import ov_sharding

if TYPE_CHECKING:
  from apps.trainer.run import Run

GONE = AGAIN  # exit code: another process is gone or failed
_BEAT = 2.0  # seconds
_SHORT_BEAT = 0.5  # seconds, until all have been heard, and at the end of this process
_SILENT = 3 * _BEAT  # without a beat, once something else is wrong as well
# Codes that say what every process should end with: a mistake, Ctrl-C, SIGTERM.
_SHARED_CODES = (2, 130, 143)
# Errors that a process gets because another is gone. Others count as its own.
_OF_OTHERS = re.compile(
  r"gloo|nccl|connection (closed|reset|refused)|socket closed|coordination|heartbeat|unavailable",
  re.IGNORECASE,
)


class End(NamedTuple):
  """How a run ends: text is one line, process the one that is the cause."""

  kind: str  # done | gone | failed
  process: int
  text: str
  code: int


def judge(
  beats: dict[int, Beat], silent: dict[int, float], count: int, since: float | None
) -> End | None:
  """How a run of `count` processes ends, if it does.

  Args:
    beats: the last of each process that has posted any.
    silent: seconds since each process was heard.
    count: processes.
    since: seconds since the first process was known to have failed; None if none has.
  """
  if len(beats) == count and all(beat.done for beat in beats.values()):
    return End("done", 0, "", 0)
  failed = {i: beat for i, beat in beats.items() if beat.failed is not None}
  if since is None:
    return None
  for i in range(count):
    ended = i in beats and (beats[i].done or i in failed)
    if not ended and silent[i] >= _SILENT:
      return End("gone", i, f"no sign of life for {silent[i]:.0f} s", GONE)
  if len(failed) < count and since < _SILENT + _BEAT:
    return None  # by then it is known who is silent
  own = {i: beat for i, beat in failed.items() if not _OF_OTHERS.search(beat.failed or "")}
  first = min(own or failed)
  code = failed[first].code
  return End("failed", first, failed[first].failed or "", code if code in _SHARED_CODES else GONE)


class Hosts(Hook):
  """Watches the processes of a run; does nothing in a run of one. A context manager.

  Attributes:
    last_checkpoint: asked for the step of the newest complete checkpoint when the run ends badly.
  """

  def __init__(
    self,
    say: Callable[[str], None],
    *,
    place: str = "the workdir",
    slow_after: float = 60.0,
    gone_after: float = 30.0,
  ):
    """Reads who takes part; the thread begins with the context.

    Args:
      say: prints one line; used by process 0.
      place: the workdir, for errors that name no path.
      slow_after: seconds that a process may stay behind the others before it is named.
      gone_after: as it was told to `ov_sharding.initialize`.
    """
    self.last_checkpoint: Callable[[], int | None] = lambda: None
    self._say, self._place, self._gone_after = say, place, gone_after
    self._board = ov_sharding.board()
    self._me, self._count = jax.process_index(), jax.process_count()
    self._slow = SlowHosts(slow_after)
    self._step, self._phase, self._since = 0, STARTING, time.monotonic()
    self._spent: dict[str, float] = {}
    self._failed: str | None = None
    self._error: BaseException | None = None
    self._done = False
    self._names: dict[int, str] = {}
    self._heard: dict[int, tuple[int, float]] = {}  # number of the last beat, when it came
    self._trouble: float | None = None  # when the first failure was known
    self._suspect: int | None = None
    self._wake, self._ended = threading.Event(), threading.Event()

  def at(self, step: int, phase: str) -> None:
    """Notes what this process does from now on.

    Args:
      step: number of steps of the run that were given to the devices.
      phase: a few words; those of slow_hosts for what waits for devices, and so for the others.
    """
    now = time.monotonic()
    spent = {**self._spent, self._phase: self._spent.get(self._phase, 0.0) + now - self._since}
    self._step, self._phase, self._since, self._spent = step, phase, now, spent

  def on_start(self, run: "Run") -> None:
    """Name the last checkpoint of the run if it ends badly."""
    self.last_checkpoint = run.checkpoints.finished_step

  def on_phase(self, stage: str, step: int, phase: str) -> None:
    """Show step and phase to the other processes."""
    self.at(step, phase)

  def on_error(self, error: BaseException) -> None:
    """Report the exception to the other processes."""
    self._fail(error)

  @contextlib.contextmanager
  def told(self) -> Iterator[None]:
    """Report an exception inside to the others at once, before anything outside waits for them.

    Errors of the machine, such as a full disk, become UserError; see `run_errors`.
    """
    try:
      with run_errors(self._place, lambda: self.last_checkpoint()):
        yield
    except BaseException as error:
      self._fail(error)
      raise

  def __enter__(self) -> Self:
    if self._board is not None:
      _on_abort(self._last_words)
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
      # The thread ends the process; this is for the case that it cannot.
      self._ended.wait(2 * self._gone_after + 60)
      _exit(report(error))
    self._done = True
    self._wake.set()
    self._ended.wait()  # whoever fails now is still heard
    _on_abort(None)  # Python code cannot run once the interpreter goes down

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
    """The thread: beats until the run ends, and ends the process where it ends badly."""
    try:
      for number in range(sys.maxsize):
        end = None
        with contextlib.suppress(ConnectionError):  # the runtime of jax tells what that means
          end = self._exchange(board, number)
        if end is not None:
          self._finish(board, end)
          return
        self._wake.wait(_BEAT if len(self._names) == self._count else _SHORT_BEAT)
        if self._wake.is_set():
          time.sleep(_SHORT_BEAT)
    finally:
      self._ended.set()

  def _exchange(self, board: ov_sharding.Board, number: int) -> End | None:
    board.put(f"hosts/{self._me}", json.dumps(self._beat(number)))
    if len(self._names) < self._count:
      found = board.items("hosts").items()
      self._names = {int(i): json.loads(text)[0] for i, text in found}
    return self._lead(board) if self._me == 0 else self._follow(board)

  def _lead(self, board: ov_sharding.Board) -> End | None:
    """What process 0 makes of the beats of all."""
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
    end = judge(beats, silent, self._count, since)
    if end is None and since is None:
      for line in self._slow.observe(now, beats):
        self._say(line)
    absent = [i for i in silent if silent[i] >= _SILENT and not (i in beats and beats[i].done)]
    self._suspect = max(absent, key=silent.__getitem__) if absent else None
    board.put("word", json.dumps({"end": end, "suspect": self._suspect}))
    return end

  def _follow(self, board: ov_sharding.Board) -> End | None:
    word = json.loads(board.get("word") or "{}")
    self._suspect = word.get("suspect")
    return End(*word["end"]) if word.get("end") else None

  def _finish(self, board: ov_sharding.Board, end: End) -> None:
    if end.kind == "done":
      return
    with contextlib.suppress(ConnectionError):
      board.put(f"read/{self._me}", "")
    error = self._error
    own = error is not None and (end.process == self._me or not _OF_OTHERS.search(str(error)))
    if own and error is not None and end.kind == "failed":
      code = report(error)
    else:
      what = "is gone" if end.kind == "gone" else "failed"
      self._tell(f"{self._name(end.process)} {what}: {end.text}")
      code = end.code
    if self._me == 0:  # with this process the board ends
      readers, deadline = self._count - (end.kind == "gone"), time.monotonic() + 2.5 * _BEAT
      while len(board.items("read")) < readers and time.monotonic() < deadline:
        time.sleep(0.1)
    _exit(code)

  def _last_words(self) -> None:
    """Runs when the runtime of jax ends this process, in a thread of its own."""
    if self._suspect is not None:
      missed = f"no sign of life for {self._gone_after:.0f} s"
      self._tell(f"{self._name(self._suspect)} is gone: {missed}")
    elif self._me != 0 and self._board is not None and not self._board.reachable():
      host, port = self._board.address
      self._tell(f"{self._name(0)} is gone: nothing listens at {host}:{port}")
    else:
      self._tell("the runtime of jax ended this process; its lines above say why")
    _exit(GONE)

  def _name(self, process: int) -> str:
    host = self._names.get(process)
    return f"process {process} ({host})" if host else f"process {process}"

  def _tell(self, what: str) -> None:
    step = _within(5.0, self.last_checkpoint)
    saved = f"last checkpoint: step {step:,}; " if step is not None else ""
    advice = "start all processes again with the same command, as launchers do"
    line = printable(f"{program()}: error: {what}; {saved}{advice}")
    print(line, file=sys.stderr, flush=True)


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
  """The answer; None where it takes longer or fails: a bucket may be out of reach as well."""
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
  """Ends the process at once: the usual end would wait for processes that are gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


_abort_handler: Any = None  # kept alive as long as the C library may call it


def _on_abort(act: Callable[[], None] | None) -> None:
  """Calls `act` where C++ code aborts this process; None: no longer.

  The `signal` module cannot do it: it runs handlers in the main thread, later, and abort() does not
  wait. The thread that aborts waits for Python's lock here, which others give up while they wait
  for devices or for the board.
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
