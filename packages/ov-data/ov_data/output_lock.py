"""Exclusive lock of an output directory on local and shared file systems.

`dataset.lock` is locked with `flock`, which is released when the process and its workers exit. The
file names the owner for messages. On a file system without `flock`, an owner on this machine is
active while its process runs, and an owner on another machine while it renews the file. A stale
lock file does not block new writers.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import functools
import os
from pathlib import Path
import threading
import time

from ov_data import fs, lock_owner
from ov_data.lock_owner import Owner

LOCK = "dataset.lock"

_ORPHANS_SECONDS = 60.0  # time for workers to notice that their parent was killed
_RENEW_SECONDS = 3.0  # without flock
_STALE_SECONDS = 15.0
_SETTLE_SECONDS = 0.2  # wait for a writer that claims the file at the same time
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def check(directory: Path) -> None:
  """Raise ValueError if another process writes to the directory."""
  try:
    descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
  except OSError:
    return
  try:
    free = _lock(descriptor, fcntl.LOCK_SH)
    owner = None if free else _running_owner(descriptor)
    if owner is not None and (free is False or _is_here(owner)):
      raise ValueError(_busy(directory, owner))
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
  """Create the directory and lock it until the block ends.

  Yields the descriptor that holds the lock. Worker processes inherit it, so the lock is held until
  the last of them exits.

  Raises:
    ValueError: if another process writes to the directory; the message names the process.
    OSError: if the directory cannot be created or written.
  """
  fs.make_folder(str(directory))
  path = directory / LOCK
  descriptor, has_flock = _acquire(directory, path)
  done = threading.Event()
  if not has_flock:
    threading.Thread(target=_renew, args=(descriptor, done), daemon=True, name="ov-lock").start()
  try:
    yield descriptor
  finally:
    done.set()
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    os.close(descriptor)


def _acquire(directory: Path, path: Path) -> tuple[int, bool]:
  """Return the descriptor of the locked file, and whether the file system supports `flock`."""
  deadline = time.monotonic() + _ORPHANS_SECONDS
  while True:
    with fs.writing(str(path)):
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
      free = _lock(descriptor, fcntl.LOCK_EX)
      if free is None:
        _wait_for_owner(directory, descriptor)
        _write_owner(path, descriptor)
        time.sleep(_SETTLE_SECONDS)
        if (other := _owner(descriptor)) != _me(os.getpid()):
          raise ValueError(_busy(directory, other, "another process"))
        return descriptor, False
      if not free:
        owner = _running_owner(descriptor)
        if owner is not None or time.monotonic() > deadline:
          raise ValueError(_busy(directory, owner))
      elif path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        _write_owner(path, descriptor)
        return descriptor, True
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)  # just removed by its owner, or held by exiting workers
    time.sleep(0.05)


def _lock(descriptor: int, kind: int) -> bool | None:
  """Try to lock a file without waiting; return success, or None if locks are unsupported."""
  try:
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _NO_FLOCK:
      raise
    return None
  return True


def _wait_for_owner(directory: Path, descriptor: int) -> None:
  """Raise ValueError if the owner of a lock file without `flock` is active."""
  if (owner := _running_owner(descriptor)) is None:
    return
  is_here = _is_here(owner)
  before, end = os.fstat(descriptor).st_mtime_ns, time.monotonic() + _STALE_SECONDS
  while not is_here and time.monotonic() < end and os.fstat(descriptor).st_mtime_ns == before:
    time.sleep(0.1)
  if is_here or os.fstat(descriptor).st_mtime_ns != before:
    raise ValueError(_busy(directory, owner))


def _renew(descriptor: int, done: threading.Event) -> None:
  while not done.wait(_RENEW_SECONDS):
    with contextlib.suppress(OSError):  # just closed
      os.utime(descriptor)


def _write_owner(path: Path, descriptor: int) -> None:
  with fs.writing(str(path)):
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, lock_owner.to_bytes(_me(os.getpid())), 0)


@functools.cache
def _me(pid: int) -> Owner:
  """Return the entry of this process, which is `pid`."""
  return lock_owner.this_process()


def _owner(descriptor: int) -> Owner | None:
  """Return the owner in the lock file; None if the file is damaged."""
  return lock_owner.parse(os.pread(descriptor, 4096, 0))


def _is_here(owner: Owner) -> bool:
  return owner.machine == _me(os.getpid()).machine


def _running_owner(descriptor: int) -> Owner | None:
  """Return the owner in the lock file; None if it ran on this machine and has exited."""
  owner = _owner(descriptor)
  ended = owner and _is_here(owner) and lock_owner.has_ended(owner, _me(os.getpid()))
  return None if ended else owner


def _busy(
  directory: Path, owner: Owner | None, unknown: str = "workers of a killed process"
) -> str:
  holder = unknown
  if owner:
    host, since = fs.printable(owner.host), fs.printable(owner.since)
    holder = f"process {owner.pid} on {host}, started {since}"
  return (
    f"{fs.printable(str(directory))} is locked by {holder}; wait until it has finished, or choose "
    "another output directory"
  )
