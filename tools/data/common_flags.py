"""Common flags of the apps that write shards, validated during parsing."""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path

from absl import flags

from ov_data import outputs, writer

OUTPUT = flags.DEFINE_string("output", None, "Local folder for the shards.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all random choices.")
WORKERS = flags.DEFINE_integer("workers", None, "Number of processes; default: all cores.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another data set in --output.")


def local_path(value: str) -> Path:
  """Return the path of a flag with `~` expanded.

  Raises:
    ValueError: if the path is remote, of an unknown user, or not a valid file name.
  """
  path = os.path.expanduser(value)
  if path.startswith("~") and not os.path.lexists(path):
    raise ValueError(f"{value}: there is no such user; use the complete path")
  return outputs.local_path(path)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
  """Log on an interrupt that the same command resumes; exit with code 130 or 143."""
  try:
    yield
  except KeyboardInterrupt as error:
    error.args = (f"{error or 'interrupted'}; repeat the command to resume",)
    raise


def validate(name: str, check: Callable[[str], object]) -> None:
  """Validate a path flag before any work; errors name the flag."""

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
