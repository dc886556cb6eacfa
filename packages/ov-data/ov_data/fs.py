"""File access for local paths and for URLs: s3:// through pyarrow, others (gs://) through gfile.

pyarrow and TensorFlow are imported at the first access to a URL. All kinds return the same types
and raise the same errors (OSError).
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import errno
import glob as local_glob
import io
import os
import shutil
import stat
import threading
from typing import Any, BinaryIO
import uuid

from ov_data import s3_files

_AGAIN = "and repeat the command"
_REMEDIES = {
  errno.ENOSPC: f"free some space, {_AGAIN}",
  errno.EDQUOT: f"the disk quota is exceeded; free some space, {_AGAIN}",
  errno.EFBIG: "the file system or the shell (ulimit -f) does not allow files of this size",
  errno.EROFS: "the file system is mounted read-only; choose another directory",
  errno.EACCES: "choose another directory, or change its permissions",
  errno.EPERM: "choose another directory, or change its permissions",
  errno.EIO: "the disk or the network file system has an I/O error; choose another one",
}
_STATUS_THREADS = 64
_REMOTE_STEP = 8 << 20  # bytes per request of a scan
_UNIMPLEMENTED = 12  # TensorFlow error code of an unsupported scheme
_KINDS = (
  (stat.S_ISDIR, "directory"),
  (stat.S_ISFIFO, "pipe"),
  (stat.S_ISSOCK, "socket"),
  (stat.S_ISCHR, "device"),
  (stat.S_ISBLK, "device"),
)
_NO_FILE = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENXIO)


def is_remote(path: str) -> bool:
  return "://" in path


def printable(text: str) -> str:
  """Return the text as one line of valid UTF-8.

  Lone surrogates (surrogateescape in file names that are not valid UTF-8) and control characters
  become escapes such as `\\udce9` and `\\n`.
  """
  plain = text.encode("utf-8", "backslashreplace").decode()
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def check_name(path: str) -> None:
  """Raise ValueError if the path is not a valid file name."""
  if "\0" in path:
    raise ValueError(
      f"path '{printable(path)}' contains a NUL byte, which is not allowed in file names"
    )


def join(directory: str, name: str) -> str:
  return directory.rstrip("/") + "/" + name


def basename(path: str) -> str:
  return path.rstrip("/").rsplit("/", 1)[-1]


def exists(path: str) -> bool:
  return _call(path, "exists") if is_remote(path) else os.path.exists(path)


def is_dir(path: str) -> bool:
  return _call(path, "isdir") if is_remote(path) else os.path.isdir(path)


def is_link(path: str) -> bool:
  return not is_remote(path) and os.path.islink(path)


def size(path: str) -> int:
  """Return the size of the file in bytes."""
  if not is_remote(path):
    return os.stat(path).st_size
  if (found := _status(path)) is None:
    raise FileNotFoundError(errno.ENOENT, "no such file", path)
  return found[0]


def statuses(paths: Sequence[str]) -> list[tuple[int, int, int, int] | None]:
  """Return the size and three stamps of each file, which change when it is rewritten.

  Files that do not exist have None. The stamps are the times of the last change of content and of
  metadata, and the inode; remote files have only the first.
  """
  if paths and all(map(_is_s3, paths)):
    return s3_files.statuses(paths)
  if any(map(is_remote, paths)):
    with futures.ThreadPoolExecutor(_STATUS_THREADS, "ov-status") as pool:
      return list(pool.map(_status, paths))
  return list(map(_status, paths))


def _status(path: str) -> tuple[int, int, int, int] | None:
  try:
    if _is_s3(path):
      return s3_files.status(path)
    if is_remote(path):
      found = _call(path, "stat")
      return found.length, found.mtime_nsec, 0, 0
    status = os.stat(path)
  except FileNotFoundError:
    return None
  return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (1 << 62) - 1


def listdir(directory: str) -> list[str]:
  """Return the sorted names in a directory, without trailing slashes."""
  names = _call(directory, "listdir") if is_remote(directory) else os.listdir(directory)
  return sorted(name.rstrip("/") for name in names)


def glob(pattern: str) -> list[str]:
  """Return the sorted paths that match."""
  return sorted(_call(pattern, "glob") if is_remote(pattern) else local_glob.glob(pattern))


def make_folder(path: str) -> None:
  """Create a directory and its parents if they do not exist."""
  if is_remote(path):
    _call(path, "makedirs")
  else:
    with writing(path):
      os.makedirs(path, exist_ok=True)


def open_read(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
  """Open a file for sequential reading."""
  return _open_remote(path, "rb") if is_remote(path) else open(path, "rb")


@contextlib.contextmanager
def open_random(path: str, size: int) -> Iterator[BinaryIO]:
  """Open a file for reading at increasing offsets with gaps.

  Args:
    path: path of the file.
    size: size of the file in bytes.
  """
  if not is_remote(path):
    with open(path, "rb") as file:
      yield file
    return
  with io.BufferedReader(RandomFile(path, size), _REMOTE_STEP) as file:
    yield file


class RandomFile(io.RawIOBase):
  """Seekable stream of a file, in which every read is one request.

  Args:
    path: path of the file.
    size: size of the file in bytes.
    reader: reader of the file; None opens one.

  Attributes:
    error: error of the last failed read, for callers that cannot distinguish it from their own.
  """

  def __init__(self, path: str, size: int, reader: "Reader | None" = None):
    self.error: OSError | None = None
    self._reader = reader or Reader(path)
    self._size = size
    self._at = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
    self._at = start + offset
    return self._at

  def tell(self) -> int:
    return self._at

  def readinto(self, buffer: Any) -> int:
    data = self.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def read(self, size: int = -1) -> bytes:
    rest = max(0, self._size - self._at)
    length = rest if size is None or size < 0 else min(size, rest)
    try:
      data = self._reader.read(self._at, length) if length else b""
    except OSError as error:
      self.error = error
      raise
    self._at += len(data)
    return data


def read_bytes(path: str) -> bytes:
  with open_read(path) as file:
    return file.read()


def read_regular(path: str, max_bytes: int) -> bytes:
  """Read a regular file. Safe for untrusted names: never blocks on pipes or devices.

  Raises:
    FileNotFoundError: if there is no regular file of that name.
    OSError: if the file cannot be read; errno is EFBIG if it has more than `max_bytes` bytes.
  """
  if is_remote(path):
    _check_size(path, size(path), max_bytes)
    return read_bytes(path)
  try:
    with open(path, "rb", 0, opener=_open_without_waiting) as file:
      status = os.fstat(file.fileno())
      if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{path}: not a regular file")
      _check_size(path, status.st_size, max_bytes)
      return file.readall()
  except OSError as error:
    if error.errno in _NO_FILE:
      raise FileNotFoundError(f"{path}: {error.strerror}") from None
    raise


def write_atomic(path: str, data: bytes) -> None:
  """Write a file atomically: write a temporary file in the same folder and rename it.

  Raises:
    OSError: if the file cannot be written, also for remote storage.
  """
  if _is_s3(path):
    s3_files.write(path, data)
    return
  part = f"{path}.{uuid.uuid4().hex[:8]}.part"
  if is_remote(path):
    with _open_remote(part, "wb") as file:
      file.write(data)
    _call(part, "rename", path, overwrite=True)
    return
  try:
    with writing(path):
      with open(part, "wb") as file:
        file.write(data)
      os.replace(part, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.remove(part)
    raise


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
  """Add path, free space and remedy to errors of writing to a local path, such as a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno not in _REMEDIES:
      raise
    reason = os.strerror(error.errno)
    if error.errno == errno.ENOSPC:
      reason += f" ({_free_bytes(path):,} bytes free)"
    raise OSError(error.errno, f"{reason}; {_REMEDIES[error.errno]}", path) from error


def _free_bytes(path: str) -> int:
  while not os.path.exists(path) and path != os.path.dirname(path):
    path = os.path.dirname(path) or "."
  return shutil.disk_usage(path).free


class Reader:
  """Thread-safe random access to a file, which stays open for the lifetime of the object.

  Raises:
    OSError: if the path cannot be opened, or is a directory, pipe or device.
  """

  def __init__(self, path: str):
    self.path = path
    self._local = threading.local()  # handles of gfile have a position: one per thread
    self._object = s3_files.open_random(path) if _is_s3(path) else None
    self._descriptor = -1 if is_remote(path) else _open_without_waiting(path, os.O_RDONLY)
    if self._descriptor >= 0:
      mode = os.fstat(self._descriptor).st_mode
      if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file")
        raise OSError(f"{path} is a {kind}; expected a regular file. Remove it, or exclude it")

  def size(self) -> int:
    """Return the size of the file in bytes."""
    if self._object is not None:
      return self._object.size()
    return os.fstat(self._descriptor).st_size if self._descriptor >= 0 else size(self.path)

  def read(self, offset: int, length: int) -> bytes:
    """Return `length` bytes; fewer only at the end of the file."""
    if self._descriptor >= 0:
      return os.pread(self._descriptor, length, offset)
    if self._object is not None:
      return self._object.read_at(length, offset)
    with _as_os_error(self.path):
      if not hasattr(self._local, "file"):
        self._local.file = _gfile(self.path).GFile(self.path, "rb")
      self._local.file.seek(offset)
      return self._local.file.read(length)

  def __del__(self) -> None:
    if getattr(self, "_descriptor", -1) >= 0:
      os.close(self._descriptor)


def _open_without_waiting(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_NONBLOCK)


def _check_size(path: str, size: int, max_bytes: int) -> None:
  if size > max_bytes:
    raise OSError(errno.EFBIG, f"{size} bytes, more than {max_bytes}", path)


def _is_s3(path: str) -> bool:
  return path.startswith(s3_files.PREFIX)


@contextlib.contextmanager
def _open_remote(path: str, mode: str) -> Iterator[BinaryIO]:
  if _is_s3(path):
    with s3_files.open_read(path) as file:
      yield file
    return
  with _as_os_error(path), _gfile(path).GFile(path, mode) as file:
    yield file


def _call(path: str, function: str, *args: Any, **kwargs: Any) -> Any:
  with _as_os_error(path):
    return getattr(_gfile(path), function)(path, *args, **kwargs)


def _gfile(path: str) -> Any:
  """Return the functions for a URL: those of gfile, or of `s3_files`, which have the same names."""
  if _is_s3(path):
    return s3_files
  try:
    from tensorflow.io import gfile
  except ImportError as error:
    raise ImportError(
      f"reading {path} requires TensorFlow, which is not installed ({error}); "
      "pip install 'ov-data[tensorflow]', or copy the data to a local directory"
    ) from None
  return gfile


@contextlib.contextmanager
def _as_os_error(path: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    code = getattr(error, "error_code", None)  # set on every tf.errors.OpError
    if code is None:
      raise
    kinds = {5: FileNotFoundError, 7: PermissionError, 16: PermissionError}
    text = " ".join(str(error).split())
    if code == _UNIMPLEMENTED:
      text += "; use gs:// or copy the data to a local directory"
    raise kinds.get(code, OSError)(f"{path}: {text}") from error
