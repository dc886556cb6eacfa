"""Detection of symbolic links that point outside a folder of images.

A link in an untrusted folder could add any local file to the training data. Links are therefore
followed only within the folder, unless the user permits more. Paths given by the user (the folder
itself, a shard, a tar) may be links to any target.
"""

import functools
import os

from ov_data import fs

POINTS_OUTSIDE = "link leads outside"  # reason of a skip


class LinkError(OSError):
  """A link points outside the folder of its collection."""


def target_outside(root: str, name: str) -> str | None:
  """Return the resolved path of a file that is outside the folder of its collection.

  Args:
    root: folder of the collection; a link is resolved first.
    name: file name relative to `root`.

  Returns:
    The path of the target, or None if it is inside the folder or the folder is remote.
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
  """Return a message with the link, its target and the remedy."""
  return (
    f"{fs.printable(name)} -> {fs.printable(target)}; copy it into the folder, or set follow_links "
    "if you trust all links"
  )


def check_list(root: str, name: str) -> None:
  """Raise ValueError if a list of images in a folder is a link to a file outside the folder."""
  if target := target_outside(root, name):
    raise ValueError(f"{fs.printable(root)}: {POINTS_OUTSIDE}: {describe(name, target)}")


@functools.lru_cache(maxsize=4096)
def _real_folder(here: str, path: str) -> str:
  """Return the resolved path of a folder; relative paths are relative to `here`."""
  return os.path.realpath(os.path.join(here, path))
