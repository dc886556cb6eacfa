"""Validation of output paths before any work; see `ov_data.output_lock` for locking."""

from collections.abc import Collection
import contextlib
import os
from pathlib import Path
import re

from ov_data import fs, manifest, output_lock, unfinished
from ov_data.output_lock import LOCK as LOCK
from ov_data.output_lock import locked as locked

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # pathlib collapses "//"


def local_path(path: str | os.PathLike[str]) -> Path:
  """Return a local output path.

  Raises:
    ValueError: if the path is remote or not a valid file name.
  """
  text = os.fsdecode(path)
  fs.check_name(text)
  if match := _SCHEME.match(text):
    rest = text[match.end() :]
    url = f"{match[1]}://{rest}"
    remedy = f"write to a local directory and copy it to {url} when it is complete"
    if match[1].lower() == "file":
      url, remedy = f"file:///{rest}", f"omit the scheme: /{rest}"
    raise ValueError(f"output {fs.printable(url)}: expected a local path; {remedy}")
  return Path(text)


def check_file(path: str | os.PathLike[str]) -> Path:
  """Return the path of an output file.

  Raises:
    ValueError: if the path is remote, a directory, or in a directory that does not exist.
    OSError: if its directory is not writable.
  """
  file = local_path(path)
  if file.is_dir():
    raise ValueError(
      f"output {fs.printable(str(file))} is a directory; expected the name of a file"
    )
  if not file.parent.is_dir():
    raise ValueError(
      f"output {fs.printable(str(file))}: there is no directory {fs.printable(str(file.parent))}; "
      "create it first"
    )
  _check_writable(file.parent)
  return file


def check_directory(path: str | os.PathLike[str]) -> Path:
  """Return the path of an output directory, which need not exist.

  Raises:
    ValueError: if the path is remote or not a directory, or another process writes to it.
    OSError: if the directory cannot be created or written.
  """
  directory = local_path(path)
  name = fs.printable(str(directory))
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    os.stat(directory)  # raises if the name is too long or not accessible
  nearest = directory
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if nearest.is_symlink() and not nearest.exists():
    raise ValueError(f"output {name}: {nearest} is a broken link; remove it")
  if not nearest.is_dir():
    raise ValueError(f"output {name}: {nearest} is not a directory; choose another path")
  _check_writable(nearest)
  output_lock.check(directory)
  return directory


def check_names(directory: Path, more: Collection[str] = ()) -> None:
  """Check that no output file name is taken by something other than a regular file.

  Args:
    directory: output directory, which need not exist.
    more: names of output files in addition to those of every data set.

  Raises:
    ValueError: if a name is taken, for example by a directory, a pipe or a broken link.
  """
  for name in (LOCK, manifest.MANIFEST, manifest.SKIPPED, unfinished.FOLDER, *more):
    path = directory / name
    fits = path.is_dir() if name == unfinished.FOLDER else path.is_file()
    if os.path.lexists(path) and (not fits or name == LOCK and path.is_symlink()):
      raise ValueError(
        f"{fs.printable(str(path))} exists and is not a file of a data set; "
        "remove it, or choose another output directory"
      )


def check_readable(directory: Path, splits: Collection[str]) -> None:
  """Check that `ov_data.Source(directory, split)` will be able to read the output.

  Raises:
    ValueError: if a split name is invalid, or a file in the directory takes precedence over shards
      or has the name of a file of the data set.
  """
  check_names(directory)
  for split in splits:
    others = [other for other in splits if other.startswith((f"{split}-", f"{split}."))]
    if not re.fullmatch(r"[^/\[\]\0]+", split) or others:
      raise ValueError(
        f"split {split!r}: expected a name without '/', '[' and ']' that is not the beginning of "
        f"another split {others or ''}".rstrip()
      )
    if (directory / split).is_dir():
      raise ValueError(
        f"{directory} has a folder {split!r}, which would be read as the split of that name; "
        "choose another output directory"
      )
  if directory.is_dir() and manifest.is_tfds(str(directory)):
    raise ValueError(
      f"{directory} holds a data set of TensorFlow Datasets ({manifest.TFDS_INFO}); choose another "
      "output directory"
    )


def _check_writable(directory: Path) -> None:
  if not os.access(directory, os.W_OK | os.X_OK):
    reason = "the file system is mounted read-only or you lack permission"
    raise PermissionError(
      f"{fs.printable(str(directory))} cannot be written: {reason}; choose another directory"
    )
