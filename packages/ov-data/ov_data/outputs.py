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

from ov_data import fs, manifest, unfinished

LOCK = "dataset.lock"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # pathlib makes one slash of two
_ORPHANS_SECONDS = 60  # for workers to notice that the process that started them was killed

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


def check_names(directory: Path, more: Collection[str] = ()) -> None:
  """Check that what is written to a directory is not there already as something else.

  Args:
    directory: of the output; it need not exist.
    more: names of files that are written there besides those of every data set.

  Raises:
    ValueError: a name is taken, for instance by a directory, a pipe or a link that leads nowhere.
  """
  for name in (LOCK, manifest.MANIFEST, manifest.SKIPPED, unfinished.FOLDER, *more):
    path = directory / name
    fits = path.is_dir() if name == unfinished.FOLDER else path.is_file()
    if os.path.lexists(path) and (not fits or name == LOCK and path.is_symlink()):
      raise ValueError(
        f"{fs.printable(str(path))} is taken by something else than a data set writes there; "
        "remove it, or choose another output directory"
      )


def check_readable(directory: Path, splits: Collection[str]) -> None:
  """Check that `ov_data.Source(directory, split)` will read what is written there.

  Raises:
    ValueError: a split has an impossible name, or something in the directory goes before shards,
      or takes the name of a file of the data set.
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
        f"{directory} has a folder {split!r}, which readers take for the split of that name; "
        "choose another output directory"
      )
  if directory.is_dir() and manifest.is_tfds(str(directory)):
    raise ValueError(
      f"{directory} holds a data set of TensorFlow Datasets ({manifest.TFDS_INFO}); choose another "
      "output directory"
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
  """Create the directory and keep other writers out of it until the block ends.

  Yields the descriptor that holds the lock. Worker processes inherit it, so that the lock lasts
  until the last of them ends, however the writer itself ends. A lock file that is left over is not
  in the way.

  Raises:
    ValueError: another process writes there; names it.
    OSError: the directory cannot be created or written.
  """
  fs.make_folder(str(directory))
  path = directory / LOCK
  descriptor = _acquire(directory, path)
  try:
    yield descriptor
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    os.close(descriptor)


def _acquire(directory: Path, path: Path) -> int:
  deadline = time.monotonic() + _ORPHANS_SECONDS
  while True:
    with fs.writing(str(path)):
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
      if not _lock(descriptor, fcntl.LOCK_EX):
        holder = _holder(directory)
        if holder or time.monotonic() > deadline:
          raise ValueError(_busy(directory, holder or "workers of a killed process"))
      elif path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with fs.writing(str(path)):
          os.ftruncate(descriptor, 0)
          os.pwrite(descriptor, content, 0)
        return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)  # removed by its owner just now, or held by workers that are about to end
    time.sleep(0.05)


def _lock(descriptor: int, kind: int) -> bool:
  """Lock a file without waiting; return whether no other process holds it."""
  try:
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    log.warning("the file system has no locks (%s); start no second writer there", error)
  return True


def _holder(directory: Path) -> str | None:
  """Return which process writes there; None if none does, or it was killed."""
  try:
    descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
  except OSError:
    return None
  try:
    if _lock(descriptor, fcntl.LOCK_SH):
      return None
    owner = json.loads(os.pread(descriptor, 4096, 0))
    pid, host = int(owner["pid"]), str(owner["host"])
    if host == socket.gethostname():
      os.kill(pid, 0)  # sends nothing; raises where the process has ended
    return f"process {pid} on {fs.printable(host)}"
  except ProcessLookupError:
    return None
  except PermissionError:
    return f"process {pid} of another user"
  except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
    return "another process"
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
