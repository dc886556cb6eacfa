"""Folders that appear complete or not at all, written under a private name next to their place."""

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
  """Yield an empty folder that becomes `target` when the block ends without an error.

  The folder has an unpredictable name and mode 0700 while it is written, so that nobody else can
  plant a link in it; complete, it gets the permissions of the umask. What a killed program left is
  removed, what a running one writes is not.

  Args:
    target: must not exist, or be an empty folder. Its parents are made.

  Yields:
    The folder to write.

  Raises:
    OSError: it cannot be written; the message is one line with `target`. Nothing is left behind.
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
    except ClientError as error:  # a library that writes, in a separate process
      raise OSError(f"{target} cannot be written: {str(error).splitlines()[-1]}") from error
    except (OSError, safetensors.SafetensorError) as error:
      if _names_another_place(error, target.parent):
        raise
      reason = " ".join(str(error).split()) or type(error).__name__
      raise OSError(
        f"{target} cannot be written: {reason}; nothing was left behind. Make room, or choose a "
        "folder that you may write."
      ) from error


def _names_another_place(error: Exception, folder: Path) -> bool:
  """Whether an error is of a file outside `folder`, such as one that is read."""
  name = getattr(error, "filename", None)
  return isinstance(name, str | os.PathLike) and not Path(name).absolute().is_relative_to(folder)


def _remove_left_behind(target: Path) -> None:
  """Removes folders of killed programs: those of this user that no program holds."""
  for path in target.parent.iterdir():
    if not (path.name.startswith(f".{target.name}.") and path.name.endswith(_SUFFIX)):
      continue
    try:
      held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
      continue  # a link, a file, or a folder of somebody else
    try:
      if os.fstat(held).st_uid == os.getuid():
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
      pass  # a program that runs holds it
    finally:
      os.close(held)


def _apply_umask(folder: Path) -> None:
  """Gives everything the usual permissions; safetensors writes files that only the owner reads."""
  os.umask(mask := os.umask(0))
  for path in (folder, *folder.rglob("*")):
    if not path.is_symlink():
      path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
