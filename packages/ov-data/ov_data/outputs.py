"""Output directories: checked before any work, and locked while they are written."""

from collections.abc import Collection, Iterator
import contextlib
import fcntl
import json
import logging
import os
from pathlib import Path
import re
import socket
import time

from ov_data import fs, manifest

LOCK = "dataset.lock"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # pathlib makes one slash of two
_ATTEMPTS = 100

log = logging.getLogger("ov_data")


def local_path(path: str | os.PathLike[str]) -> Path:
  """Return an output path.

  Raises:
    ValueError: it is in a bucket or another remote store, or no file can have that name.
  """
  text = os.fsdecode(path)
  fs.check_name(text)
  if match := _SCHEME.match(text):
    rest = text[match.end() :]
    url = f"{match[1]}://{rest}"
    remedy = f"write to a local directory and copy it to {url} when it is complete"
    if match[1].lower() == "file":
      url, remedy = f"file:///{rest}", f"leave out the scheme: /{rest}"
    raise ValueError(f"output {fs.printable(url)}: expected a local path; {remedy}")
  return Path(text)


def check_file(path: str | os.PathLike[str]) -> Path:
  """Return the path of a file to write.

  Raises:
    ValueError: it is remote, a directory, or in a directory that does not exist.
    OSError: its directory cannot be written.
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
    ValueError: it is remote, no directory, or another process writes there.
    OSError: it cannot be created or written.
  """
  directory = local_path(path)
  name = fs.printable(str(directory))
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    os.stat(directory)  # raises where the name is too long, or may not be looked up
  nearest = directory
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if nearest.is_symlink() and not nearest.exists():
    raise ValueError(f"output {name}: {nearest} is a link whose target is missing; remove it")
  if not nearest.is_dir():
    raise ValueError(f"output {name}: {nearest} is not a directory; choose another path")
  _check_writable(nearest)
  if holder := _holder(directory):
    raise ValueError(_busy(directory, holder))
  return directory


def check_readable(directory: Path, splits: Collection[str]) -> None:
  """Check that `ov_data.Source(directory, split)` will read what is written there.

  Raises:
    ValueError: a split has an impossible name, or something in the directory goes before shards.
  """
  for split in splits:
    others = [other for other in splits if other.startswith((f"{split}-", f"{split}."))]
    if not re.fullmatch(r"[^/\[\]\0]+", split) or others:
      raise ValueError(
        f"split {split!r}: expected a name without '/', '[' and ']' that is not the beginning of "
        f"another split {others or ''}".rstrip()
      )
    if (directory / split).is_dir():
      raise ValueError(
        f"{directory} has a folder {split!r}, which readers take for the split of that name; "
        "choose another output directory"
      )
  if directory.is_dir() and manifest.is_tfds(str(directory)):
    raise ValueError(
      f"{directory} holds a data set of TensorFlow Datasets ({manifest.TFDS_INFO}); choose another "
      "output directory"
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
  """Create the directory and keep other writers out of it until the block ends.

  The lock belongs to the process and ends with it, however it ends: a lock file that a killed
  process has left is not in the way.

  Raises:
    ValueError: another process writes there; names it.
    OSError: the directory cannot be created or written.
  """
  fs.make_folder(str(directory))
  path = directory / LOCK
  descriptor = _acquire(directory, path)
  try:
    yield
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    os.close(descriptor)


def _acquire(directory: Path, path: Path) -> int:
  for _ in range(_ATTEMPTS):
    with fs.writing(str(path)):
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      if holder := _holder(directory):
        raise ValueError(_busy(directory, holder)) from None
      time.sleep(0.01)  # another process looked whether it is locked
      continue
    except OSError as error:  # a file system without locks
      log.warning("%s cannot be locked (%s); start no second writer there", directory, error)
    try:
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with fs.writing(str(path)):
          os.ftruncate(descriptor, 0)
          os.pwrite(descriptor, content, 0)
        return descriptor
    except FileNotFoundError:  # its owner has just finished and removed it
      pass
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)
  raise ValueError(f"{path} is created and removed all the time; is another writer running?")


def _holder(directory: Path) -> str | None:
  """Return which process writes there; None if none does."""
  path = directory / LOCK
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
  except OSError:
    return None
  try:
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return None
  except BlockingIOError:
    try:
      owner = json.loads(os.pread(descriptor, 4096, 0))
      return f"process {int(owner['pid'])} on {fs.printable(str(owner['host']))}"
    except (ValueError, LookupError, TypeError, RecursionError):
      return "another process"
  except OSError:  # a file system without locks
    return None
  finally:
    os.close(descriptor)


def _busy(directory: Path, holder: str) -> str:
  return (
    f"{fs.printable(str(directory))} is being written by {holder}; wait until it ends, or choose "
    "another output directory"
  )


def _check_writable(directory: Path) -> None:
  if not os.access(directory, os.W_OK | os.X_OK):
    reason = "the file system is mounted read-only or you lack permission"
    raise PermissionError(
      f"{fs.printable(str(directory))} cannot be written: {reason}; choose another directory"
    )
