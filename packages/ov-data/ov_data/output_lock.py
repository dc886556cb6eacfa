"""One writer at a time in an output directory, on local disks and shared file systems.

`dataset.lock` is locked with `flock`, which ends with the process and its workers, however they
end. Its content names the owner, for messages. On a file system without `flock` the content counts:
an owner on this machine by its process, one on another machine by whether it renews the file. A
lock file that is left over is never in the way.
"""

from collections.abc import Iterator
import contextlib
import datetime
import errno
import fcntl
import functools
import json
import os
from pathlib import Path
import socket
import threading
import time
from typing import Any

from ov_data import fs

LOCK = "dataset.lock"

_ORPHANS_SECONDS = 60.0  # for workers to notice that the process that started them was killed
_RENEW_SECONDS = 3.0  # without flock
_STALE_SECONDS = 15.0
_SETTLE_SECONDS = 0.2  # for another writer that took the file at the same moment
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def check(directory: Path) -> None:
  """Raise ValueError where another process is known to write there."""
  try:
    descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
  except OSError:
    return
  try:
    free = _lock(descriptor, fcntl.LOCK_SH)
    owner = None if free else _running_owner(descriptor)
    if owner is not None and (free is False or owner.get("host") == socket.gethostname()):
      raise ValueError(_busy(directory, owner))
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
  """Create the directory and keep other writers out of it until the block ends.

  Yields the descriptor that holds the lock. Worker processes inherit it, so that the lock lasts
  until the last of them ends, however the writer itself ends.

  Raises:
    ValueError: another process writes there; names it.
    OSError: the directory cannot be created or written.
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
  """Return the descriptor of the locked file, and whether the file system has locks."""
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
        if (other := _owner(descriptor)) != _process(os.getpid()):
          raise ValueError(_busy(directory, other))
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
    os.close(descriptor)  # removed by its owner just now, or held by workers that are about to end
    time.sleep(0.05)


def _lock(descriptor: int, kind: int) -> bool | None:
  """Lock a file without waiting; return whether no other process holds it, None without locks."""
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
  """Raise ValueError if the owner in a file without flock is at work."""
  if (owner := _running_owner(descriptor)) is None:
    return
  is_here = owner.get("host") == socket.gethostname()
  before, end = os.fstat(descriptor).st_mtime_ns, time.monotonic() + _STALE_SECONDS
  while not is_here and time.monotonic() < end and os.fstat(descriptor).st_mtime_ns == before:
    time.sleep(0.1)
  if is_here or os.fstat(descriptor).st_mtime_ns != before:
    raise ValueError(_busy(directory, owner))


def _renew(descriptor: int, done: threading.Event) -> None:
  while not done.wait(_RENEW_SECONDS):
    with contextlib.suppress(OSError):  # closed just now
      os.utime(descriptor)


def _write_owner(path: Path, descriptor: int) -> None:
  with fs.writing(str(path)):
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_process(os.getpid())).encode(), 0)


@functools.cache
def _process(pid: int) -> dict[str, Any]:
  """Return what the file says of this process, whose number is `pid`; always the same."""
  now = datetime.datetime.now(datetime.UTC)
  return {
    "pid": pid,
    "host": socket.gethostname(),
    "since": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
    "ticks": _start_ticks(pid),
  }


def _start_ticks(pid: int) -> str:
  """Return when a process has started, which tells apart two of one number; "" if unknown."""
  try:
    stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    return stat.rpartition(")")[2].split()[19]  # after the name, which may hold blanks
  except (OSError, IndexError):
    return ""


def _owner(descriptor: int) -> dict[str, Any]:
  """Return what the file says; {} if that is damaged."""
  try:
    owner = json.loads(os.pread(descriptor, 4096, 0))
    int(owner["pid"]), str(owner["host"])
    return dict(owner)
  except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
    return {}


def _running_owner(descriptor: int) -> dict[str, Any] | None:
  """Return the owner that the file names; None if it ran on this machine and has ended."""
  owner = _owner(descriptor)
  if not owner or owner["host"] != socket.gethostname():
    return owner or None
  pid, ticks = int(owner["pid"]), owner.get("ticks")
  try:
    os.kill(pid, 0)  # sends nothing; raises where the process has ended
  except (ProcessLookupError, OverflowError):
    return None
  except PermissionError:  # of another user
    return owner
  return owner if not ticks or _start_ticks(pid) in ("", ticks) else None


def _busy(directory: Path, owner: dict[str, Any] | None) -> str:
  holder = "another process"
  if owner:
    holder = f"process {owner['pid']} on {fs.printable(str(owner['host']))}"
    if owner.get("since"):
      holder += f", started {fs.printable(str(owner['since']))}"
  elif owner is None:
    holder = "workers of a killed process"
  return (
    f"{fs.printable(str(directory))} is being written by {holder}; wait until it ends, or choose "
    "another output directory"
  )
