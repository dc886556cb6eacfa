"""Symbolic links that lead out of a folder of images.

A folder of images often comes from someone else. A link in it may lead to any file of this machine,
which would end up among the training data. So links are followed only within the folder, unless the
user allows more. Paths that the user names, such as the folder itself, a shard or a tar, may be
links to anywhere.
"""

import functools
import os

from ov_data import fs

LEADS_OUT = "link leads outside"  # a reason for skipping, fit for counting


class LinkError(OSError):
  """A link leads out of the folder of its collection."""


def target_outside(root: str, name: str) -> str | None:
  """Return where a file really is, if links lead out of the folder of its collection.

  Args:
    root: the folder. If it is a link itself, its target is the folder.
    name: of the file, relative to it.

  Returns:
    The path of the target; None where it is in the folder, or the folder is remote.
  """
  if fs.is_remote(root):
    return None
  path = fs.join(root or ".", name)
  folder, _, base = path.rpartition("/")
  here = os.getcwd()
  real = fs.join(_real_folder(here, folder), base)
  if os.path.islink(path):
    real = os.path.realpath(path)
  top = _real_folder(here, root or ".")
  return None if real == top or real.startswith(top.rstrip("/") + "/") else real


def describe(name: str, target: str) -> str:
  """Return which link leads where, and the remedy."""
  return (
    f"{fs.printable(name)} -> {fs.printable(target)}; copy it into the folder, or set follow_links "
    "if you trust all links"
  )


def check_list(root: str, name: str) -> None:
  """Raise ValueError where a list of images that was found in a folder is not in it."""
  if target := target_outside(root, name):
    raise ValueError(f"{fs.printable(root)}: {LEADS_OUT}: {describe(name, target)}")


@functools.lru_cache(maxsize=4096)
def _real_folder(here: str, path: str) -> str:
  """Return the path of a folder without links; `here` is what a relative path begins at."""
  return os.path.realpath(os.path.join(here, path))
