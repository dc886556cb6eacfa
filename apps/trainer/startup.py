"""Process setup that every program needs before its slow imports.

`set_up` ensures three things:
  - logging never ends a program: output that cannot be written (closed pipe, full disk) is dropped;
  - paths and files are UTF-8 in every locale;
  - SIGINT and SIGTERM end the program with one line and exit code 130 or 143, from the first import
    on. `stop.StopRequest` replaces the handlers during training.

This module imports the standard library only.
"""

import codecs
import io
import locale
import os
import re
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Any
import warnings

_NAMES = {signal.SIGINT: "SIGINT (Ctrl-C)", signal.SIGTERM: "SIGTERM"}
# Control characters except newline and tab, and bidirectional formatting characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_received: signal.Signals | None = None
_reported: set[str] = set()  # messages about background threads


class Terminated(KeyboardInterrupt):
  """Unhandled SIGTERM; like KeyboardInterrupt not an Exception."""


def set_up() -> None:
  """Prepare standard streams, encoding and signal handlers; may be called twice.

  Call it first in a program: if the locale is not UTF-8, the program is restarted in Python's UTF-8
  mode.
  """
  _open_closed_streams()
  _restart_in_utf8()
  _tolerate_failed_writes()
  for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
  ):
    if signal.getsignal(number) is default:  # keep the setting of a parent process that ignores it
      signal.signal(number, _interrupt)
  # Failed saves leave such coroutines.
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  sys.unraisablehook = _unraisable
  sys.excepthook = _uncaught
  threading.excepthook = lambda failed: _report_background(failed.exc_value)


def received() -> signal.Signals | None:
  """Return the signal that interrupted this program; None if there was none."""
  return _received


def describe(number: signal.Signals) -> str:
  """Return the name of a signal for a message, such as "SIGINT (Ctrl-C)"."""
  return _NAMES.get(number, number.name)


def program() -> str:
  """Return the name of the program, the prefix of its error lines."""
  return os.path.splitext(os.path.basename(sys.argv[0]))[0]


def printable(text: str) -> str:
  r"""Escape control characters except newlines, so that a path cannot control the terminal.

  Returns:
    The text with, for example, the escape character written as `\x1b`.
  """
  text = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)
  return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _open_closed_streams() -> None:
  """Open /dev/null for closed standard streams: the next opened file would get their number."""
  for fd in (0, 1, 2):
    try:
      os.fstat(fd)
    except OSError:
      os.dup2(os.open(os.devnull, os.O_RDWR), fd, inheritable=True)


def _restart_in_utf8() -> None:
  encodings = sys.getfilesystemencoding(), locale.getpreferredencoding(False)
  if sys.flags.utf8_mode or all(codecs.lookup(name).name == "utf-8" for name in encodings):
    return
  os.environ["PYTHONUTF8"] = "1"  # for child processes
  os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


class _Tolerant(io.RawIOBase):
  """File descriptor for text output that drops what cannot be written."""

  def __init__(self, fd: int):
    self._fd = fd

  def writable(self) -> bool:
    return True

  def fileno(self) -> int:
    return self._fd

  def isatty(self) -> bool:
    return os.isatty(self._fd)

  def write(self, data: Any) -> int:
    try:
      return os.write(self._fd, data)
    except OSError:
      return len(data)


def _tolerate_failed_writes() -> None:
  for name, fd in (("stdout", 1), ("stderr", 2)):
    stream = getattr(sys, name)
    if stream is not None and stream is not getattr(sys, f"__{name}__"):
      continue  # captured, for example by a test
    if stream is not None and isinstance(getattr(stream.buffer, "raw", None), _Tolerant):
      continue
    buffer = io.BufferedWriter(_Tolerant(fd))
    lines = name == "stderr" or os.isatty(fd)
    replacement = io.TextIOWrapper(
      buffer, encoding="utf-8", errors="backslashreplace", line_buffering=lines
    )
    setattr(sys, name, replacement)
    setattr(sys, f"__{name}__", replacement)


def _interrupt(number: int, frame: FrameType | None) -> None:
  global _received
  if _received is not None:  # exit immediately on the second signal
    os._exit(128 + number)
  _received = signal.Signals(number)
  text = f"stopped by {describe(_received)}"
  raise KeyboardInterrupt(text) if number == signal.SIGINT else Terminated(text)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
  """Handle an exception that Python drops, as in a destructor."""
  global _received
  error = unraisable.exc_value
  if isinstance(error, KeyboardInterrupt) and _received is not None:
    number, _received = _received, None
    # Again after this hook has returned, because an exception in it would be dropped as well.
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
  elif not isinstance(error, OSError):  # OSError: for example a file closed on a full disk
    _report_background(error)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  """End an interrupted import with one line; `errors.run_app` handles all other errors."""
  if threading.current_thread() is not threading.main_thread():  # callback of a library
    _report_background(error)
  elif _received is not None:
    print(f"{program()}: stopped by {describe(_received)}", file=sys.stderr, flush=True)
    os._exit(128 + _received)
  else:
    sys.__excepthook__(kind, error, trace)


def _report_background(error: BaseException | None) -> None:
  """Print one line for an unhandled background error, once per message.

  Threads of libraries fail by the hundred once the program fails, and the program reports its own
  error.
  """
  if error is None or isinstance(error, SystemExit) or str(error) == "Event loop is closed":
    return
  if os.environ.get("OV_TRACEBACK") == "1":
    traceback.print_exception(error)
    return
  frames = traceback.extract_tb(error.__traceback__)
  place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  line = printable(f"{program()}: warning: in the background: {text}{place}")
  if line not in _reported:
    _reported.add(line)
    print(line, file=sys.stderr)
