"""Atomic creation of folders: written under a temporary name, then renamed."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
from pathlib import Path
import shutil
import tempfile

import safetensors

from ov_convert.client_env import ClientError

_SUFFIX = ".partial"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
  """Yield an empty folder that is renamed to `target` when the block ends without an error.

  While it is written, the folder has an unpredictable name and mode 0700, so that no other user can
  plant a link in it; afterwards it gets the permissions of the umask. Folders left by killed
  processes are removed, those of running processes are not.

  Args:
    target: path that does not exist, or an empty folder. Parents are created.

  Yields:
    The temporary folder.

  Raises:
    OSError: if the folder cannot be written; the message is one line with `target`. The temporary
      folder is removed.
  """
  target = target.absolute()
  with contextlib.ExitStack() as stack:
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      _remove_left_behind(target)
      partial = Path(tempfile.mkdtemp(_SUFFIX, f".{target.name}.", target.parent))
      stack.callback(shutil.rmtree, partial, ignore_errors=True)
      held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
      stack.callback(os.close, held)
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield partial
      if not os.path.samestat(os.fstat(held), partial.lstat()):
        raise OSError(f"{partial} was replaced while it was written")
      _apply_umask(partial)
      partial.rename(target)
    except ClientError as error:  # a library in a separate process failed to write
      raise OSError(f"{target} cannot be written: {str(error).splitlines()[-1]}") from error
    except (OSError, safetensors.SafetensorError) as error:
      if _names_another_place(error, target.parent):
        raise
      reason = " ".join(str(error).split()) or type(error).__name__
      raise OSError(
        f"{target} cannot be written: {reason}; no files were left. Free space, or choose a "
        "folder that you may write."
      ) from error


def _names_another_place(error: Exception, folder: Path) -> bool:
  """Return whether an error is about a file outside `folder`, such as an input."""
  name = getattr(error, "filename", None)
  return isinstance(name, str | os.PathLike) and not Path(name).absolute().is_relative_to(folder)


def _remove_left_behind(target: Path) -> None:
  """Remove folders of killed processes: those of this user that are not locked."""
  for path in target.parent.iterdir():
    if not (path.name.startswith(f".{target.name}.") and path.name.endswith(_SUFFIX)):
      continue
    try:
      held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
      continue  # a link, a file, or a folder of another user
    try:
      if os.fstat(held).st_uid == os.getuid():
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
      pass  # locked by a running process
    finally:
      os.close(held)


def _apply_umask(folder: Path) -> None:
  """Set permissions according to the umask; safetensors writes files with mode 0600."""
  os.umask(mask := os.umask(0))
  for path in (folder, *folder.rglob("*")):
    if not path.is_symlink():
      path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
