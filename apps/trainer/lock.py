"""Lock of a workdir: one run at a time on local disks, shared file systems and buckets.

  with lock.folder(Path("/runs/a"), "--workdir=/runs/a"):
    ...  # a second run on this folder fails with one line that names this process

The file `run.lock` names the owner: host, process, job, start time. There are two mechanisms:

  flock   on file systems where `flock` works across hosts. The lock ends with its process.
  lease   in buckets and on other file systems. It ends when its owner deletes the file.

In both cases the owner renews the file every 3 s. A new run takes the lock over at once if
  - nobody holds it,
  - the owner ran on this machine and its process has ended,
  - the owner ran on another machine as part of the same job (`lock_owner.job_id`): a scheduler
    restarts a job only after its last attempt has ended.
Any other owner on another machine is watched for up to 15 s. If it renews the file, it is alive and
the new run fails; otherwise the lock is stale and is taken over. Clocks of machines are not
compared.

An owner whose lock was taken over, such as a suspended process, exits at once.

Libraries such as filelock support no buckets, and do not detect that an owner on another machine
has ended.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import fcntl
import os
from pathlib import Path
import sys
import threading
import time
from typing import Protocol
import uuid

from absl import logging
import tensorstore

from apps.trainer.errors import UserError
from apps.trainer.startup import printable, program
from ov_data.lock_owner import Owner, has_ended, parse, this_process, to_bytes

FILE = "run.lock"
RENEW_SECONDS = 3.0
STALE_SECONDS = 15.0  # five missed renewals
_REQUEST_SECONDS = 60.0  # timeout of a bucket request
_LOST = 2  # exit code: a restart would conflict with the new owner
# File systems where flock may not work across hosts, or not at all.
_WITHOUT_FLOCK = ("fuse", "lustre", "9p", "virtiofs", "cifs", "smb", "afs")
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def folder(
  path: Path, setting: str, log: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
  """Hold the lock of a folder on a file system; create the folder.

  Args:
    path: path of the folder.
    setting: name and value of the setting, for messages.
    log: function that prints a line while the owner is watched.

  Raises:
    UserError: another run holds the lock.
    OSError: the folder cannot be written.
  """
  path.mkdir(parents=True, exist_ok=True)
  me, file = this_process(), path / FILE
  fd = _flock(file, me, setting, log) if _flock_reaches_all(path) else None
  if fd is None:
    with _lease(_FileRecord(file), me, setting, log):
      yield
    return
  try:
    with _watching(lambda: _renew_file(fd, file, me), setting):
      yield
  finally:
    with contextlib.suppress(OSError):  # the folder may be deleted
      if _is_file(fd, file):
        file.unlink()
    os.close(fd)


def bucket(
  store: tensorstore.KvStore, setting: str, log: Callable[[str], None] = lambda text: None
) -> contextlib.AbstractContextManager[None]:
  """Hold the lock of a folder in a bucket.

  Args:
    store: key-value store of the folder.
    setting: name and value of the setting, for messages.
    log: function that prints a line while a lease is watched.

  Raises:
    UserError: another run holds the lock.
    ValueError, TimeoutError: the bucket cannot be used.
  """
  return _lease(_BucketRecord(store), this_process(), setting, log)


def _in_use_error(owner: Owner | None, setting: str) -> UserError:
  if owner is None:
    return UserError(
      f"{setting} is in use by another run; wait until it ends, or choose another folder"
    )
  return UserError(
    f"{setting} is in use by {owner}; wait until it ends, stop it with kill {owner.pid} on "
    f"{owner.host}, or choose another folder"
  )


def _flock_reaches_all(path: Path) -> bool:
  """Return whether flock on the file system of a folder works across hosts."""
  best, kind = "", ""
  try:
    mounts = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape").splitlines()
  except OSError:  # not Linux
    return True
  resolved = os.path.realpath(path)
  for line in mounts:
    _, point, this_kind, *_ = line.split(" ")
    point = point.replace("\\040", " ")
    inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
    if inside and len(point) >= len(best):
      best, kind = point, this_kind
  return not kind.startswith(_WITHOUT_FLOCK)


def _flock(file: Path, me: Owner, setting: str, log: Callable[[str], None]) -> int | None:
  """Lock the file with flock and write `me` into it.

  Returns:
    File descriptor that holds the lock; None if the file system has no flock.
  """
  for _ in range(50):
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is_file(fd, file):  # another run may have removed or replaced it after open
        os.ftruncate(fd, 0)
        os.pwrite(fd, to_bytes(me), 0)
        return fd
      os.close(fd)
    except BlockingIOError:
      os.close(fd)
      owner, seen = _read_file(file)
      if owner is None:  # its owner is about to write or remove it
        time.sleep(0.1)
      # Held after its process ended: by a child process, or by the server for a lost host.
      elif _may_take(owner, seen, me, lambda: _read_file(file), setting, log):
        return _replace(file, me)
    except OSError as error:
      os.close(fd)
      if error.errno in _NO_FLOCK:
        return None
      raise OSError(error.errno, error.strerror, str(file)) from error
  raise _in_use_error(None, setting)


def _read_file(file: Path) -> tuple[Owner | None, object]:
  """Return the owner in a file, and a value that changes with each renewal."""
  try:
    with open(file, "rb") as opened:  # opening updates the modification time on NFS
      return parse(opened.read(10_000)), os.fstat(opened.fileno()).st_mtime_ns
  except FileNotFoundError:
    return None, None


def _may_take(
  owner: Owner | None,
  seen: object,
  me: Owner,
  read: Callable[[], tuple[Owner | None, object]],
  setting: str,
  log: Callable[[str], None],
) -> bool:
  """Return whether `me` may take over the lock of `owner`; watch the owner if that is unknown.

  Args:
    owner: owner of the lock; None for a record that this module did not write.
    seen: value that changes with each renewal of the lock.
    me: this process.
    read: function that reads owner and `seen` again.
    setting: name and value of the setting, for messages.
    log: function that prints a line.

  Returns:
    False if another process took the lock in the meantime.

  Raises:
    UserError: the owner is alive.
  """
  ended = owner and has_ended(owner, me)
  if ended is False:
    raise _in_use_error(owner, setting)
  if ended:
    return True
  log(
    f"{setting} was last in use by {owner or 'another run'}: waiting up to "
    f"{STALE_SECONDS:.0f} s for a renewal of its lock"
  )
  deadline = time.monotonic() + STALE_SECONDS
  while time.monotonic() < deadline:
    time.sleep(STALE_SECONDS / 30)
    found, now = read()
    if now != seen:
      if found and owner and found.token == owner.token:
        raise _in_use_error(owner, setting)
      return False
  return True


def _replace(file: Path, me: Owner) -> int:
  """Lock a new file and rename it to replace one whose owner has ended."""
  new = file.with_name(f"{file.name}.{me.token}.partial")
  fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.pwrite(fd, to_bytes(me), 0)
    os.replace(new, file)
  except BaseException:
    os.close(fd)
    with contextlib.suppress(OSError):
      new.unlink()
    raise
  return fd


def _is_file(fd: int, file: Path) -> bool:
  """Return whether the path still refers to the open file."""
  try:
    return os.path.samestat(os.fstat(fd), os.stat(file))
  except FileNotFoundError:
    return False


def _renew_file(fd: int, file: Path, me: Owner) -> Owner | None:
  """Renew the file; return the owner that replaced it, or None."""
  try:
    if _is_file(fd, file):
      os.utime(fd)
      return None
    owner = parse(file.read_bytes())
  except OSError:  # deleted with the workdir, which fails on the next write of the run
    return None
  return owner if owner is not None and owner.token != me.token else None


class _Record(Protocol):
  """Record of a lease, visible to all machines."""

  def read(self) -> tuple[bytes | None, object]:
    """Return the content, None if there is none, and its generation."""

  def write(self, data: bytes | None, generation: object) -> object | None:
    """Replace (None: delete) a generation; return the new one, or None on a conflict."""


class _BucketRecord:
  """Object in a bucket, written on condition of its generation."""

  def __init__(self, store: tensorstore.KvStore):
    self._store = store

  def read(self) -> tuple[bytes | None, object]:
    found = self._store.read(FILE).result(timeout=_REQUEST_SECONDS)
    return (found.value if found.state == "value" else None), found.stamp.generation

  def write(self, data: bytes | None, generation: object) -> object | None:
    assert isinstance(generation, bytes)
    stamp = self._store.write(FILE, data, if_equal=generation).result(timeout=_REQUEST_SECONDS)
    return stamp.generation or None


class _FileRecord:
  """File. Two simultaneous writers both succeed; the first one notices at its next renewal."""

  def __init__(self, path: Path):
    self._path = path

  def read(self) -> tuple[bytes | None, object]:
    try:
      data = self._path.read_bytes()
    except FileNotFoundError:
      return None, None
    return data, data

  def write(self, data: bytes | None, generation: object) -> object | None:
    if self.read()[0] != generation:
      return None
    if data is None:
      self._path.unlink(missing_ok=True)
      return b""
    part = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.partial")
    try:
      part.write_bytes(data)
      os.replace(part, self._path)
    except OSError:
      part.unlink(missing_ok=True)
      raise
    return data


@contextlib.contextmanager
def _lease(record: _Record, me: Owner, setting: str, log: Callable[[str], None]) -> Iterator[None]:
  lease = _Lease(record, me)
  lease.acquire(setting, log)
  try:
    with _watching(lease.renew, setting):
      yield
  finally:
    lease.release()


class _Lease:
  """Lease of this process."""

  def __init__(self, record: _Record, me: Owner):
    self._record, self._me = record, me
    self._generation: object = None

  def acquire(self, setting: str, log: Callable[[str], None]) -> None:
    """Wait for the lease; raise UserError if a live process holds it."""
    while True:
      data, generation = self._record.read()
      if data is None or _may_take(parse(data), generation, self._me, self._read, setting, log):
        self._generation = self._record.write(to_bytes(self._me), generation)
        if self._generation is not None:
          return

  def _read(self) -> tuple[Owner | None, object]:
    data, generation = self._record.read()
    return (None if data is None else parse(data)), generation

  def renew(self) -> Owner | None:
    """Renew the lease; return the owner that took it over, or None."""
    renewed = dataclasses.replace(self._me, renewals=self._me.renewals + 1)
    written = self._record.write(to_bytes(renewed), self._generation)
    if written is None:
      owner, generation = self._read()
      if owner is not None and owner.token != self._me.token:
        return owner
      self._generation = generation  # deleted, or the response to the last renewal was lost
      return None
    self._me, self._generation = renewed, written
    return None

  def release(self) -> None:
    try:
      self._record.write(None, self._generation)
    except Exception as error:  # the next run detects that this process has ended
      logging.debug("%s: %s", FILE, error)


@contextlib.contextmanager
def _watching(look: Callable[[], Owner | None], setting: str) -> Iterator[None]:
  """Call `look` in a thread; exit the process when it returns another owner."""
  over = threading.Event()

  def watch() -> None:
    while not over.wait(RENEW_SECONDS):
      try:
        owner = look()
      except Exception as error:  # a network failure; retry later
        logging.debug("%s: %s", setting, error)
        continue
      if owner is not None and not over.is_set():
        _end(
          f"{setting} was taken over by {owner}; this process ends, its checkpoints are complete"
        )

  thread = threading.Thread(target=watch, name="ov-lock", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join(_REQUEST_SECONDS)  # a renewal after the release would recreate the record


def _end(text: str) -> None:
  print(f"{program()}: error: {printable(text)}", file=sys.stderr, flush=True)
  os._exit(_LOST)
