"""Errors that end a program: a line for users, a traceback for bugs, and the exit code.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | a bug, with a traceback |
| 2 | something the user must change first; launchers do not start the run again |
| 75 | may pass by itself, such as a full disk; launchers start the run again |
| 130, 143 | stopped by SIGINT (Ctrl-C) or SIGTERM |
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import copy
import errno
import logging as standard_logging
import os
import re
import sys
import traceback
from typing import TypeVar

from absl import app, flags, logging

from apps.trainer import startup
from apps.trainer.startup import printable, program

_T = TypeVar("_T")


MAX_MESSAGE = 1000  # characters of a message that ends the program


class UserError(Exception):
  """Something the user can put right; the message says what was found, expected, and to do."""


class Unreachable(UserError):
  """An error that may pass by itself, such as a network failure; starting again may help."""


AGAIN = 75  # exit code: no mistake, and starting again may help; launchers do

# Raised by the set-up of a run for a wrong value, a missing file or a malformed record.
_SET_UP_ERRORS = (
  ValueError, OSError, LookupError, TypeError, re.error, MemoryError, OverflowError, RecursionError
)  # fmt: skip
# Their text alone does not say what happened: 'x' of a KeyError, "" of a MemoryError.
_NAMED = (LookupError, TypeError, re.error, MemoryError, OverflowError, RecursionError)

_AGAIN_IS = "give the same command again"
_NO_SPACE = f"free space and {_AGAIN_IS}"
_NO_RIGHT = f"make it writable and {_AGAIN_IS}, or choose another folder"
_REMEDIES = {
  errno.ENOSPC: _NO_SPACE,
  errno.EDQUOT: _NO_SPACE,
  errno.EROFS: _NO_RIGHT,
  errno.EACCES: _NO_RIGHT,
  errno.EPERM: _NO_RIGHT,
  errno.ENOENT: f"restore it and {_AGAIN_IS}; another program may have deleted or moved it",
  errno.EIO: f"check the disk and {_AGAIN_IS}",
  errno.ESTALE: f"check the network file system and {_AGAIN_IS}",
}
# Errors that the user must act on before a new start can help; any other may pass by itself.
_LASTING = (
  errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
  errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
)  # fmt: skip


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Turn the errors of a set-up phase into UserError; the cause stays attached."""
  try:
    yield
  except _SET_UP_ERRORS as error:
    kind = Unreachable if _passes(error) else UserError
    raise kind(_text(error)) from error


@contextlib.contextmanager
def run_errors(place: str, last_checkpoint: Callable[[], int | None]) -> Iterator[None]:
  """Turn what the machine can do to a running run into UserError, with what is saved.

  Args:
    place: the workdir, for errors that name no path.
    last_checkpoint: returns the step of the newest complete checkpoint, None without one.

  Raises:
    UserError: for OSError (no permission, deleted folder) and MemoryError; Unreachable where the
      cause may pass by itself, such as a full disk.
    KeyboardInterrupt: as received, with what is saved added to its text.
  """
  try:
    yield
  except KeyboardInterrupt as error:
    _say_saved(error, _saved(last_checkpoint), f"{_AGAIN_IS} to resume")
    raise
  except UserError as error:
    cause, saved = error.__cause__, _saved(last_checkpoint)
    of_machine = isinstance(cause, OSError) and cause.errno is not None
    if hasattr(error, "saved") or (of_machine and "complete" in saved):
      _say_saved(error, saved)
    raise
  except (OSError, MemoryError) as error:
    ended = (Unreachable if _passes(error) else UserError)(_describe(error, place))
    if isinstance(error, MemoryError) or error.errno is not None:  # others say what to do
      _say_saved(ended, _saved(last_checkpoint), _remedy(error))
    raise ended from error
  except RuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):  # as XLA reports that an array does not fit
      raise
    raise UserError(
      f"the devices have too little memory: {str(error).splitlines()[0]}; "
      f"{_saved(last_checkpoint)}lower config.batch_size, or raise config.accumulate or "
      "config.model.remat"
    ) from error


def _say_saved(error: BaseException, saved: str, remedy: str = "") -> None:
  """Add what is saved to the text of an error, or bring it up to date: a save may have ended."""
  before = getattr(error, "saved", None)
  if before is None:
    text = f"{error or 'interrupted'}; {saved}{remedy}".removesuffix("; ")
  else:
    text = str(error).replace(before, saved.rstrip("; "), 1) if before and saved else str(error)
  error.args = (text,)
  setattr(error, "saved", saved.rstrip("; ") or before or "")  # noqa: B010 (not of the class)


def _passes(error: BaseException) -> bool:
  """Whether starting again may help."""
  if not isinstance(error, OSError):
    return False
  if isinstance(error, ChildProcessError | ConnectionError | TimeoutError):
    return True
  if error.errno is None:  # the text of a library
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
  return error.errno not in _LASTING


def _describe(error: OSError | MemoryError, place: str) -> str:
  """Path and reason."""
  if isinstance(error, MemoryError):
    return f"this machine has too little memory{f': {error}' if str(error) else ''}"
  if error.errno is None:
    return str(error) or type(error).__name__
  path = error.filename
  # Some errors carry a remedy of their own in strerror.
  reason = os.strerror(error.errno) if error.errno in _REMEDIES else error.strerror
  return f"{os.fsdecode(path) if isinstance(path, str | bytes) else place}: {reason}"


def _remedy(error: OSError | MemoryError) -> str:
  if isinstance(error, MemoryError):
    return "lower config.batch_size, config.input.num_threads or config.input.shuffle"
  return _REMEDIES.get(error.errno or 0, f"correct this and {_AGAIN_IS}")


def _saved(last_checkpoint: Callable[[], int | None]) -> str:
  """What the newest checkpoint is; nothing where that cannot be read, as in a deleted workdir."""
  try:
    step = last_checkpoint()
  except Exception as error:
    logging.debug("last checkpoint: %s", error)
    return ""
  return "no checkpoint yet; " if step is None else f"the checkpoint of step {step:,} is complete; "


def _text(error: BaseException) -> str:
  """The message of an error, with its type where the message alone says too little."""
  text = str(error)
  if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
    text = f"{os.fsdecode(error.filename)}: {error.strerror}"
  if isinstance(error, MemoryError):
    return _describe(error, "")
  if isinstance(error, _NAMED) or not text:
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
  return text


def _message(error: BaseException) -> str:
  """What went wrong; where config_flags put a traceback into the text, its first cause."""
  while "Traceback" in str(error) and (inner := error.__cause__ or error.__context__):
    error = inner
  if isinstance(error, AttributeError) and isinstance(error.__context__, KeyError):
    name = ". ".join(str(error.__context__.args[0]).splitlines())  # and one that is meant, perhaps
    return f"the configuration (see apps/configs/base.py) has no setting {name}"
  if isinstance(error, AttributeError) and "'get_config'" in str(error):
    return "the file of --config has no function get_config(arg); see apps/configs/caption_demo.py"
  if isinstance(error, ImportError | NameError | ArithmeticError | AssertionError | RuntimeError):
    frame = traceback.extract_tb(error.__traceback__)[-1]  # of a config file
    return f"{frame.filename}, line {frame.lineno}: {str(error) or type(error).__name__}"
  return _text(error)


def _setting_of_file(error: BaseException) -> str | None:
  """The setting that a config file used and that is not there; None for other errors."""
  while error.__cause__ is not None:
    error = error.__cause__
  if not (isinstance(error, AttributeError) and isinstance(error.__context__, KeyError)):
    return None
  text = str(error.__context__.args[0])
  found = re.search(r"[\"'](\w+)[\"']", text) or re.match(r"(\w+)", text)
  return found[1] if found else None


def exit_code(error: BaseException) -> int:
  """The exit code of a program that ends with this error."""
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else int(error.code is not None)
  if isinstance(error, UserError):
    return AGAIN if isinstance(error, Unreachable) else 2
  if isinstance(error, startup.Terminated):
    return 143
  return 130 if isinstance(error, KeyboardInterrupt) else 1


def report(error: BaseException) -> int:
  """Print what ends the program to stderr: one line, or a traceback for a bug.

  Returns:
    The exit code.
  """
  with_traceback = os.environ.get("OV_TRACEBACK") == "1"
  if isinstance(error, KeyboardInterrupt):
    print(f"{program()}: {one_line(error) if str(error) else 'interrupted'}", file=sys.stderr)
  elif isinstance(error, UserError) and not with_traceback:
    print(f"{program()}: error: {one_line(error)}", file=sys.stderr)
  elif not isinstance(error, SystemExit):
    print(printable("".join(traceback.format_exception(error))), file=sys.stderr, end="")
  return exit_code(error)


def one_line(error: BaseException, longest: int = MAX_MESSAGE) -> str:
  """Return the message of an error in one line without control characters, its type if it has none.

  A user's own text can make a message arbitrarily long. The middle of a long one is left out: it
  begins with the value received and ends with the remedy.

  Args:
    error: whose message.
    longest: characters of the line, at least 100.
  """
  text = printable(" ".join(str(error).split())) or type(error).__name__
  if len(text) > longest:
    length, end = f" ... ({len(text):,} characters) ... ", longest // 5
    text = text[: longest - end - len(length)] + length + text[-end:]
  return text


class _OneLineLogs(standard_logging.Formatter):
  """Formats records without control characters, and without tracebacks of libraries' threads."""

  def __init__(self, inner: standard_logging.Formatter):
    super().__init__()
    self._inner = inner

  def format(self, record: standard_logging.LogRecord) -> str:
    if record.exc_info and os.environ.get("OV_TRACEBACK") != "1":
      record = copy.copy(record)
      record.exc_info = record.exc_text = None
    return printable(self._inner.format(record))


def run_app(
  main: Callable[..., None],
  *,
  arguments: bool = False,
  explain: Callable[[Sequence[str]], str | None] | None = None,
) -> None:
  """Run an absl app in which a UserError ends the program with one line and exit code 2.

  Relative paths, the config file's included, are read from where the user stands: `bazel run`
  starts programs elsewhere. OV_TRACEBACK=1 shows the full traceback.

  Args:
    main: called without arguments; or, where `arguments` is set, with the list of those that are
      no flags.
    arguments: whether there may be such; otherwise they are refused.
    explain: gets the command line when its flags cannot be parsed; returns a message with the
      remedy, or None for the message of the parser.
  """
  startup.set_up()
  logging.set_verbosity(logging.WARNING)  # libraries' chatter; --verbosity=0 shows it
  handler = logging.get_absl_handler().python_handler
  handler.stream = sys.stderr
  handler.setFormatter(_OneLineLogs(logging.PythonFormatter()))
  if "BUILD_WORKING_DIRECTORY" in os.environ:
    os.chdir(os.environ["BUILD_WORKING_DIRECTORY"])

  def guarded(function: Callable[[Sequence[str]], _T], argv: Sequence[str]) -> _T:
    try:
      return function(argv)
    except (UserError, KeyboardInterrupt) as error:
      sys.exit(report(error))
    except Exception:
      # A library may turn the interrupt into its own error, as a failed import does.
      if (number := startup.received()) is None:
        raise
      report(KeyboardInterrupt(f"stopped by {startup.describe(number)}"))
      sys.exit(128 + number)

  def parse(argv: Sequence[str]) -> list[str]:
    def parse_flags(args: Sequence[str]) -> list[str]:
      try:  # config files run here, and may raise anything
        return flags.FLAGS(args)
      except Exception as error:
        in_file = isinstance(error, ImportError | NameError) or "Traceback" in str(error)
        said = None if in_file or explain is None else explain(args)
        if said is None and explain is not None and (name := _setting_of_file(error)):
          said = explain([f"--config.{name}"])
        raise UserError(said or _message(error)) from error

    rest = guarded(parse_flags, argv)
    if len(rest) > 1 and not arguments:
      guarded(_refuse, rest[1:])
    return rest

  call = (lambda argv: main(argv[1:])) if arguments else (lambda _: main())
  app.run(lambda argv: guarded(call, argv), flags_parser=parse)


def _refuse(arguments: Sequence[str]) -> None:
  raise UserError(f"unexpected arguments {' '.join(arguments)!r}; flags start with --")
