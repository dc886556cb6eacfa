"""Validation of folders on the command line of //apps:export."""

import os
from pathlib import Path
import re

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://?")


def local(flag: str, value: str) -> Path:
  """Return a local path.

  Args:
    flag: flag for error messages, such as "--out=" or "safetensors:".
    value: value of the flag; a leading ~ is expanded.

  Raises:
    ValueError: if the path is empty, remote, or in the home of an unknown user.
  """
  if not value:
    raise ValueError(f"{flag} is empty; expected a local folder")
  if _REMOTE.match(value) and not Path(value).exists():
    raise ValueError(
      f"{flag}{value} is remote; expected a local folder: copy it with, for example, "
      "gcloud storage cp -r"
    )
  try:
    return Path(value).expanduser()
  except RuntimeError as error:
    raise ValueError(f"{flag}{value}: {error}; expected a local folder") from None


def existing(flag: str, value: str) -> Path:
  """Return an existing local folder; raise ValueError for any other path."""
  path = local(flag, value)
  if not path.is_dir():
    found = "is a file" if path.exists() else "does not exist"
    raise ValueError(f"{flag}{value}: {path} {found}; expected a folder")
  return path


def new(flag: str, value: str) -> Path:
  """Return a local path where a folder can be created.

  Raises:
    ValueError: if the path exists and is not an empty folder, or the folder cannot be created.
  """
  path = local(flag, value)
  try:
    if path.is_symlink():
      raise ValueError(f"{flag}{value} is a link; choose a folder that does not exist")
    if path.exists():
      if not path.is_dir():
        raise ValueError(f"{flag}{value} exists and is a file; choose another folder")
      if any(path.iterdir()):
        raise ValueError(f"{flag}{value} exists and is not empty; choose another folder")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
  except OSError as error:
    raise ValueError(f"{flag}{value}: {error.strerror}; choose another folder") from None
  if not parent.is_dir():
    raise ValueError(f"{flag}{value}: {parent} is a file; choose another folder")
  if not os.access(parent, os.W_OK | os.X_OK):
    raise ValueError(f"{flag}{value}: {parent} is not writable; choose another folder")
  return path
