"""Flags of every app here that writes shards, checked when they are parsed."""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path

from absl import flags

from ov_data import outputs, writer

OUTPUT = flags.DEFINE_string("output", None, "Local folder for the shards.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed, other random choices.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: one for each core.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another data set in --output.")


def local_path(value: str) -> Path:
  """Return the path of a flag, `~` expanded.

  Raises:
    ValueError: it is remote, of an unknown user, or no file can have that name.
  """
  path = os.path.expanduser(value)
  if path.startswith("~") and not os.path.lexists(path):
    raise ValueError(f"{value}: there is no such user; write the path in full")
  return outputs.local_path(path)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
  """Add to an interrupt that the same command resumes; exit codes are 130 and 143."""
  try:
    yield
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; the same command resumes from here",)
    raise


def validate(name: str, check: Callable[[str], object]) -> None:
  """Check a flag of a path before any work; errors name the flag."""

  def checked(value: str | None) -> bool:
    try:
      if value:
        check(value)
    except (ValueError, OSError) as error:
      raise flags.ValidationError(str(error)) from error
    return True

  flags.register_validator(name, checked)


def _check_output(value: str) -> None:
  path = local_path(value)
  if not (path / writer.MANIFEST).exists():  # a complete data set may be read-only
    outputs.check_directory(path)


validate("output", _check_output)
