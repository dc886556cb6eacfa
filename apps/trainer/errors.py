"""Mistakes of the user, told in one line; everything else keeps its traceback."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import re
import sys
import traceback
from typing import TypeVar

from absl import app, flags, logging

_T = TypeVar("_T")


class UserError(Exception):
  """Something the user can put right; the message says what was found, expected, and to do."""


class Unreachable(UserError):
  """What may pass by itself, such as a network that is away; starting again may help."""


AGAIN = 75  # exit code: no mistake, and starting again may help; launchers do

# What the set-up of a run raises for a wrong value, a missing file or a malformed record.
_SET_UP_ERRORS = (ValueError, OSError, LookupError)
# What parsing the flags raises; a config file is executed there.
_PARSE_ERRORS = (
  flags.Error, AttributeError, ImportError, NameError, SyntaxError, TypeError, *_SET_UP_ERRORS
)  # fmt: skip


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Turns the errors of a set-up phase into UserError; the cause stays attached."""
  try:
    yield
  except _SET_UP_ERRORS as error:
    raise UserError(str(error) or type(error).__name__) from error


def _message(error: BaseException) -> str:
  """What went wrong; where config_flags put a traceback into the text, its first cause."""
  while "Traceback" in str(error) and (inner := error.__cause__ or error.__context__):
    error = inner
  if isinstance(error, AttributeError) and isinstance(error.__context__, KeyError):
    name = ". ".join(str(error.__context__.args[0]).splitlines())  # and one that is meant, perhaps
    return f"the configuration (see apps/configs/base.py) has no setting {name}"
  if isinstance(error, AttributeError) and "'get_config'" in str(error):
    return "the file of --config has no function get_config(arg); see apps/configs/caption_demo.py"
  if isinstance(error, ImportError | NameError):  # of a config file
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}: {error}"
  return str(error)


def _setting_of_file(error: BaseException) -> str | None:
  """The setting that a config file used and that is not there; None for other errors."""
  while error.__cause__ is not None:
    error = error.__cause__
  if not (isinstance(error, AttributeError) and isinstance(error.__context__, KeyError)):
    return None
  text = str(error.__context__.args[0])
  found = re.search(r"[\"'](\w+)[\"']", text) or re.match(r"(\w+)", text)
  return found[1] if found else None


def program() -> str:
  """The name of the app, which its errors begin with."""
  return os.path.splitext(os.path.basename(sys.argv[0]))[0]


def exit_code(error: BaseException) -> int:
  """The exit code of a program that ends with this error."""
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else int(error.code is not None)
  if isinstance(error, UserError):
    return AGAIN if isinstance(error, Unreachable) else 2
  return 130 if isinstance(error, KeyboardInterrupt) else 1


def report(error: BaseException) -> int:
  """Says on stderr what ends the program: a UserError in one line; returns the exit code."""
  if isinstance(error, UserError) and os.environ.get("OV_TRACEBACK") != "1":
    print(f"{program()}: error: {' '.join(str(error).split())}", file=sys.stderr)
  elif not isinstance(error, SystemExit):
    traceback.print_exception(error)
  return exit_code(error)


def run_app(
  main: Callable[..., None],
  *,
  arguments: bool = False,
  explain: Callable[[Sequence[str]], str | None] | None = None,
) -> None:
  """Runs an absl app in which a UserError ends the program with one line and exit code 2.

  Relative paths, the config file's included, are read from where the user stands: `bazel run`
  starts programs elsewhere. OV_TRACEBACK=1 shows the full traceback.

  Args:
    main: called without arguments; or, where `arguments` is set, with the list of those that are
      no flags.
    arguments: whether there may be such; otherwise they are refused.
    explain: gets the command line when its flags cannot be parsed; returns a message with the
      remedy, or None for the message of the parser.
  """
  logging.set_verbosity(logging.WARNING)  # libraries' chatter; --verbosity=0 shows it
  if "BUILD_WORKING_DIRECTORY" in os.environ:
    os.chdir(os.environ["BUILD_WORKING_DIRECTORY"])

  def guarded(function: Callable[[Sequence[str]], _T], argv: Sequence[str]) -> _T:
    try:
      return function(argv)
    except UserError as error:
      sys.exit(report(error))

  def parse(argv: Sequence[str]) -> list[str]:
    def parse_flags(args: Sequence[str]) -> list[str]:
      try:  # config files run here
        return flags.FLAGS(args)
      except _PARSE_ERRORS as error:
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
