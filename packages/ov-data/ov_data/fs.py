"""Files by path: local ones, and anything with a scheme (gs://...) through TensorFlow's gfile.

TensorFlow is imported the first time a path with a scheme is touched, and by nothing else. Both
kinds answer with the same types and the same errors (OSError), so callers never ask which it is.
"""

from collections.abc import Iterator
import contextlib
import errno
import glob as local_glob
import os
import shutil
import stat
import threading
from typing import Any, BinaryIO
import uuid

_AGAIN = "and give the same command again"
_REMEDIES = {
  errno.ENOSPC: f"free some space, {_AGAIN}",
  errno.EDQUOT: f"the quota is used up; free some space, {_AGAIN}",
  errno.EFBIG: "the file system or a limit of the shell (ulimit -f) forbids files of this size",
  errno.EROFS: "the file system is mounted read-only; choose another directory",
  errno.EACCES: "choose another directory, or change its permissions",
  errno.EPERM: "choose another directory, or change its permissions",
  errno.EIO: "the disk or the network file system fails; choose another one",
}
_UNIMPLEMENTED = 12  # of TensorFlow's error codes: a scheme that it cannot read
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
  """Return the text in one line that every UTF-8 terminal and file accepts.

  File names that are not valid UTF-8 reach Python as lone surrogates (surrogateescape). They and
  control characters become escapes such as `\\udce9` and `\\n`.
  """
  plain = text.encode("utf-8", "backslashreplace").decode()
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def check_name(path: str) -> None:
  """Raise ValueError if no file can have this path."""
  if "\0" in path:
    raise ValueError(f"path '{printable(path)}' has a NUL byte in it, which no file name can have")


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
  """Bytes in the file."""
  return _call(path, "stat").length if is_remote(path) else os.stat(path).st_size


def listdir(directory: str) -> list[str]:
  """Names in the directory, sorted, without trailing slashes."""
  names = _call(directory, "listdir") if is_remote(directory) else os.listdir(directory)
  return sorted(name.rstrip("/") for name in names)


def glob(pattern: str) -> list[str]:
  """Paths that match, sorted."""
  return sorted(_call(pattern, "glob") if is_remote(pattern) else local_glob.glob(pattern))


def make_folder(path: str) -> None:
  """Create a directory and its parents; one that exists is fine."""
  if is_remote(path):
    _call(path, "makedirs")
  else:
    with writing(path):
      os.makedirs(path, exist_ok=True)


def open_read(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
  """The file, to be read from front to back."""
  return _open_remote(path, "rb") if is_remote(path) else open(path, "rb")


def read_bytes(path: str) -> bytes:
  with open_read(path) as file:
    return file.read()


def read_regular(path: str, most: int) -> bytes:
  """The bytes of a file whose name comes from elsewhere: no pipe blocks, no device has no end.

  Raises:
    FileNotFoundError: there is no regular file of that name.
    OSError: it cannot be read; with errno EFBIG where it has more than `most` bytes.
  """
  if is_remote(path):
    _check_size(path, size(path), most)
    return read_bytes(path)
  try:
    with open(path, "rb", 0, opener=_open_without_waiting) as file:
      status = os.fstat(file.fileno())
      if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{path}: no regular file")
      _check_size(path, status.st_size, most)
      return file.readall()
  except OSError as error:
    if error.errno in _NO_FILE:
      raise FileNotFoundError(f"{path}: {error.strerror}") from None
    raise


def write_atomic(path: str, data: bytes) -> None:
  """Writes the whole file or nothing: beside the target first, then renamed over it.

  Raises:
    OSError: also where a remote store refuses.
  """
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
  """Reads at any offset, from many threads at once. The file stays open while this object lives.

  Raises:
    OSError: the path cannot be opened, or is a directory, pipe or device.
  """

  def __init__(self, path: str):
    self.path = path
    self._local = threading.local()  # a remote handle keeps a position: one for each thread
    self._descriptor = -1 if is_remote(path) else _open_without_waiting(path, os.O_RDONLY)
    if self._descriptor >= 0:
      mode = os.fstat(self._descriptor).st_mode
      if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file")
        raise OSError(f"{path} is a {kind}; expected a regular file. Move it away, or leave it out")

  def size(self) -> int:
    """Return the bytes in the file."""
    return os.fstat(self._descriptor).st_size if self._descriptor >= 0 else size(self.path)

  def read(self, offset: int, length: int) -> bytes:
    """Up to `length` bytes; fewer only at the end of the file."""
    if self._descriptor >= 0:
      return os.pread(self._descriptor, length, offset)
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


def _check_size(path: str, size: int, most: int) -> None:
  if size > most:
    raise OSError(errno.EFBIG, f"{size} bytes, more than {most}", path)


@contextlib.contextmanager
def _open_remote(path: str, mode: str) -> Iterator[BinaryIO]:
  with _as_os_error(path), _gfile(path).GFile(path, mode) as file:
    yield file


def _call(path: str, function: str, *args: Any, **kwargs: Any) -> Any:
  with _as_os_error(path):
    return getattr(_gfile(path), function)(path, *args, **kwargs)


def _gfile(path: str) -> Any:
  try:
    from tensorflow.io import gfile
  except ImportError as error:
    raise ImportError(
      f"reading {path} needs TensorFlow, which is not installed ({error}); "
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
    text = " ".join(str(error).split())  # in one line
    if code == _UNIMPLEMENTED:
      text += "; use gs:// or copy the data to a local directory"
    raise kinds.get(code, OSError)(f"{path}: {text}") from error
