"""Errors that end a program: one line for user errors, a traceback for bugs, and exit codes.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | a bug, with a traceback |
| 2 | an error that the user must fix; launchers do not restart the run |
| 75 | a possibly temporary error, such as a full disk; launchers restart the run |
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
  """An error that the user can fix; the message gives value, expectation and remedy."""


class TemporaryError(UserError):
  """A possibly temporary error, such as a network failure; a restart may succeed."""


TEMPORARY_FAILURE = 75  # exit code of temporary errors; launchers restart the run

# Raised during set-up for a wrong value, a missing file or a malformed record.
_SET_UP_ERRORS = (
  ValueError, OSError, LookupError, TypeError, re.error, MemoryError, OverflowError, RecursionError
)  # fmt: skip
# Their text alone is not informative: 'x' of a KeyError, "" of a MemoryError.
_NAMED = (LookupError, TypeError, re.error, MemoryError, OverflowError, RecursionError)

_RETRY = "give the same command again"
_NO_SPACE = f"free space and {_RETRY}"
_NO_PERMISSION = f"make it writable and {_RETRY}, or choose another folder"
_REMEDIES = {
  errno.ENOSPC: _NO_SPACE,
  errno.EDQUOT: _NO_SPACE,
  errno.EROFS: _NO_PERMISSION,
  errno.EACCES: _NO_PERMISSION,
  errno.EPERM: _NO_PERMISSION,
  errno.ENOENT: f"restore it and {_RETRY}; another program may have deleted or moved it",
  errno.EIO: f"check the disk and {_RETRY}",
  errno.ESTALE: f"check the network file system and {_RETRY}",
}
# Errors that the user must fix before a restart can succeed; all others may be temporary.
_PERMANENT = (
  errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
  errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
)  # fmt: skip


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Convert the errors of a set-up phase to UserError; the cause stays attached."""
  try:
    yield
  except _SET_UP_ERRORS as error:
    kind = TemporaryError if _is_temporary(error) else UserError
    raise kind(_text(error)) from error


@contextlib.contextmanager
def run_errors(workdir: str, last_checkpoint: Callable[[], int | None]) -> Iterator[None]:
  """Convert errors of the machine during a run to UserError, and report the last checkpoint.

  Args:
    workdir: path of the workdir, for errors that name no path.
    last_checkpoint: function that returns the step of the newest complete checkpoint, or None.

  Raises:
    UserError: an OSError (no permission, deleted folder) or MemoryError occurred; TemporaryError if
      the cause may be temporary, such as a full disk.
    KeyboardInterrupt: the run was interrupted; the message includes the last checkpoint.
  """
  try:
    yield
  except KeyboardInterrupt as error:
    _append_checkpoint(error, _saved(last_checkpoint), f"{_RETRY} to resume")
    raise
  except UserError as error:
    cause, saved = error.__cause__, _saved(last_checkpoint)
    of_machine = isinstance(cause, OSError) and cause.errno is not None
    if hasattr(error, "saved") or (of_machine and "complete" in saved):
      _append_checkpoint(error, saved)
    raise
  except (OSError, MemoryError) as error:
    ended = (TemporaryError if _is_temporary(error) else UserError)(_describe(error, workdir))
    if isinstance(error, MemoryError) or error.errno is not None:  # others include a remedy
      _append_checkpoint(ended, _saved(last_checkpoint), _remedy(error))
    raise ended from error
  except RuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):  # XLA could not allocate an array
      raise
    raise UserError(
      f"the devices have too little memory: {str(error).splitlines()[0]}; "
      f"{_saved(last_checkpoint)}lower config.batch_size, or raise config.accumulate or "
      "config.model.remat"
    ) from error


def _append_checkpoint(error: BaseException, saved: str, remedy: str = "") -> None:
  """Add the last checkpoint to the text of an error, or update it after another save."""
  before = getattr(error, "saved", None)
  if before is None:
    text = f"{error or 'interrupted'}; {saved}{remedy}".removesuffix("; ")
  else:
    text = str(error).replace(before, saved.rstrip("; "), 1) if before and saved else str(error)
  error.args = (text,)
  setattr(error, "saved", saved.rstrip("; ") or before or "")  # noqa: B010 (no declared field)


def _is_temporary(error: BaseException) -> bool:
  """Return whether the error may be temporary."""
  if not isinstance(error, OSError):
    return False
  if isinstance(error, ChildProcessError | ConnectionError | TimeoutError):
    return True
  if error.errno is None:  # an error of a library
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
  return error.errno not in _PERMANENT


def _describe(error: OSError | MemoryError, workdir: str) -> str:
  """Return the path and the reason of an error."""
  if isinstance(error, MemoryError):
    return f"this machine has too little memory{f': {error}' if str(error) else ''}"
  if error.errno is None:
    return str(error) or type(error).__name__
  path = error.filename
  # Some errors include a remedy in strerror.
  reason = os.strerror(error.errno) if error.errno in _REMEDIES else error.strerror
  return f"{os.fsdecode(path) if isinstance(path, str | bytes) else workdir}: {reason}"


def _remedy(error: OSError | MemoryError) -> str:
  if isinstance(error, MemoryError):
    return "lower config.batch_size, config.input.num_threads or config.input.shuffle"
  return _REMEDIES.get(error.errno or 0, f"correct this and {_RETRY}")


def _saved(last_checkpoint: Callable[[], int | None]) -> str:
  """Return the newest checkpoint as text; empty if unreadable, as in a deleted workdir."""
  try:
    step = last_checkpoint()
  except Exception as error:
    logging.debug("last checkpoint: %s", error)
    return ""
  return "no checkpoint yet; " if step is None else f"the checkpoint of step {step:,} is complete; "


def _text(error: BaseException) -> str:
  """Return the message of an error, with its type if the message alone is not informative."""
  text = str(error)
  if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
    text = f"{os.fsdecode(error.filename)}: {error.strerror}"
  if isinstance(error, MemoryError):
    return _describe(error, "")
  if isinstance(error, _NAMED) or not text:
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
  return text


def _message(error: BaseException) -> str:
  """Return what failed; if config_flags added a traceback to the text, its first cause."""
  while "Traceback" in str(error) and (inner := error.__cause__ or error.__context__):
    error = inner
  if isinstance(error, AttributeError) and isinstance(error.__context__, KeyError):
    name = ". ".join(str(error.__context__.args[0]).splitlines())  # may include a suggestion
    return f"the configuration (see apps/configs/base.py) has no setting {name}"
  if isinstance(error, AttributeError) and "'get_config'" in str(error):
    return "the file of --config has no function get_config(arg); see apps/configs/caption_demo.py"
  if isinstance(error, ImportError | NameError | ArithmeticError | AssertionError | RuntimeError):
    frame = traceback.extract_tb(error.__traceback__)[-1]  # in the config file
    return f"{frame.filename}, line {frame.lineno}: {str(error) or type(error).__name__}"
  return _text(error)


def _setting_of_file(error: BaseException) -> str | None:
  """Return the unknown setting that a config file used; None for other errors."""
  while error.__cause__ is not None:
    error = error.__cause__
  if not (isinstance(error, AttributeError) and isinstance(error.__context__, KeyError)):
    return None
  text = str(error.__context__.args[0])
  found = re.search(r"[\"'](\w+)[\"']", text) or re.match(r"(\w+)", text)
  return found[1] if found else None


def exit_code(error: BaseException) -> int:
  """Return the exit code of a program that ends with this error."""
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else int(error.code is not None)
  if isinstance(error, UserError):
    return TEMPORARY_FAILURE if isinstance(error, TemporaryError) else 2
  if isinstance(error, startup.Terminated):
    return 143
  return 130 if isinstance(error, KeyboardInterrupt) else 1


def report(error: BaseException) -> int:
  """Print the error that ends the program to stderr: one line, or a traceback for a bug.

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
  """Return the message of an error in one line without control characters, or else its type.

  Long messages are shortened in the middle, because they begin with the value received and end with
  the remedy.

  Args:
    error: the error to format.
    longest: maximum length of the line, at least 100.
  """
  text = printable(" ".join(str(error).split())) or type(error).__name__
  if len(text) > longest:
    length, end = f" ... ({len(text):,} characters) ... ", longest // 5
    text = text[: longest - end - len(length)] + length + text[-end:]
  return text


class _OneLineLogs(standard_logging.Formatter):
  """Formatter that removes control characters, and tracebacks of library threads."""

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
  rename: Callable[[str], str] = str,
) -> None:
  """Run an absl app in which a UserError ends the program with one line and exit code 2.

  Relative paths, including that of the config file, are resolved against the directory of the user,
  because `bazel run` starts programs elsewhere. OV_TRACEBACK=1 shows the full traceback.

  Args:
    main: function without arguments; if `arguments` is set, it takes the list of positional
      arguments.
    arguments: whether positional arguments are allowed; otherwise they are an error.
    explain: function from a command line with invalid flags to a message with the remedy, or None
      to use the message of the parser.
    rename: function that maps a flag to its current name.
  """
  startup.set_up()
  sys.argv[1:] = map(rename, sys.argv[1:])  # config_flags reads sys.argv
  logging.set_verbosity(logging.WARNING)  # hide logs of libraries; --verbosity=0 shows them
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
    except Exception as error:
      # A library may convert the interrupt to another error, as in a failed import.
      if (number := startup.received()) is None:
        raise
      logging.info("error after the signal: %s", error, exc_info=error)
      report(KeyboardInterrupt(f"stopped by {startup.describe(number)}"))
      sys.exit(128 + number)

  def parse(argv: Sequence[str]) -> list[str]:
    def parse_flags(args: Sequence[str]) -> list[str]:
      try:  # runs config files, which may raise anything
        return flags.FLAGS(args)
      except Exception as error:
        in_file = isinstance(error, ImportError | NameError) or "Traceback" in str(error)
        explanation = None if in_file or explain is None else explain(args)
        if explanation is None and explain is not None and (name := _setting_of_file(error)):
          explanation = explain([f"--config.{name}"])
        raise UserError(explanation or _message(error)) from error

    rest = guarded(parse_flags, argv)
    if len(rest) > 1 and not arguments:
      guarded(_reject_arguments, rest[1:])
    return rest

  call = (lambda argv: main(argv[1:])) if arguments else (lambda _: main())
  app.run(lambda argv: guarded(call, argv), flags_parser=parse)


def _reject_arguments(arguments: Sequence[str]) -> None:
  raise UserError(f"unexpected arguments {' '.join(arguments)!r}; flags start with --")
