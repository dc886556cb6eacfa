"""Folders that users name on the command line of //apps:export, checked before any work begins."""

import os
from pathlib import Path
import re

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://?")


def local(flag: str, value: str) -> Path:
  """Return a path of this machine.

  Args:
    flag: for messages, such as "--out=" or "safetensors:".
    value: what the user gave; a leading ~ is the home folder.

  Raises:
    ValueError: it is empty, remote, or below the home of a user who does not exist.
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
  """Return a local folder that exists; raises ValueError for any other path."""
  path = local(flag, value)
  if not path.is_dir():
    found = "a file, not a folder" if path.exists() else "no such folder"
    raise ValueError(f"{flag}{value}: there is no folder {path} ({found}); check the path")
  return path


def new(flag: str, value: str) -> Path:
  """Return a local path at which a folder can be made.

  Raises:
    ValueError: something that is no empty folder is there, or the folder cannot be made there.
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
