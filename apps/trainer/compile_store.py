"""Folder, local or gs://, through which machines share compiled programs; see `compile_cache`."""

from collections.abc import Callable, Mapping
import concurrent.futures
from pathlib import Path
import re
import secrets
from typing import NamedTuple

from etils import epath
import jax

SUFFIX = "-cache"  # file suffix of an entry
ENTRY = re.compile(rf"[^/]+-[0-9a-f]{{64}}{SUFFIX}")
_FETCH_BYTES = 4 * 10**9  # maximum total size of the entries to copy, newest first


class Store:
  """Cache entries in one sub-folder per version of JAX and kind of devices.

  Attributes:
    path: path of the folder.
  """

  def __init__(self, path: str, log: Callable[[str], None]):
    """Store the arguments without touching the folder; `log` prints a line."""
    self.path = epath.Path(path).expanduser()
    self._log = log
    self._pushed: set[str] = set()

  def fetch(self, folder: Path) -> None:
    """Copy entries that a local folder lacks."""
    store = self.path / _kind()
    found = _entries(store)
    if not found:
      self._log(f"compile store {store}: no programs for these devices yet")
      return
    missing = [entry for entry in found if not (folder / entry.name).exists()]
    wanted, total = [], 0
    for entry in sorted(missing, key=lambda entry: -entry.changed):
      if total + entry.size <= _FETCH_BYTES:
        wanted.append(entry)
        total += entry.size
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(lambda entry: _copy(store / entry.name, epath.Path(folder)), wanted))
    here = len(found) - len(missing)
    left = len(missing) - len(wanted)
    self._log(
      f"compile store {store}: {len(wanted)} of {len(found)} programs copied "
      f"({megabytes(total)}), {here} already here"
      + (f", {left} older ones skipped" if left else "")
    )

  def push(self, folder: Path, names: Mapping[str, bool]) -> None:
    """Copy entries of a local folder that the store lacks.

    Args:
      folder: path of the local folder.
      names: names of entries; True replaces an entry of the store that may be damaged.
    """
    store = self.path / _kind()
    new = [name for name in names if name not in self._pushed and (folder / name).exists()]
    if not new:
      return
    store.mkdir(parents=True, exist_ok=True)
    there = {entry.name for entry in _entries(store)}
    sent = [name for name in new if name not in there or names[name]]
    for name in sent:
      _copy(epath.Path(folder / name), store)
    self._pushed.update(new)
    if sent:
      size = sum((folder / name).stat().st_size for name in sent)
      self._log(f"compile store {store}: {len(sent)} programs saved ({megabytes(size)})")


class _Entry(NamedTuple):
  name: str
  size: int  # bytes
  changed: float  # seconds since 1970


def _kind() -> str:
  """Return the sub-folder of the store for entries that may fit these devices."""
  kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
  return f"jax-{jax.__version__}/{kind}-{jax.device_count()}"


def _entries(store: epath.Path) -> list[_Entry]:
  if not store.is_dir():
    return []
  paths = [path for path in store.iterdir() if ENTRY.fullmatch(path.name)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:  # each stat is a request on gs://
    stats = pool.map(lambda path: path.stat(), paths)
    return [_Entry(p.name, s.length, s.mtime) for p, s in zip(paths, stats, strict=True)]


def _copy(source: epath.Path, folder: epath.Path) -> None:
  """Copy an entry under a temporary name, check its size, then rename it."""
  part = folder / f"part-{secrets.token_hex(8)}"
  try:
    source.copy(part, overwrite=True)
    expected, got = source.stat().length, part.stat().length
    if got != expected:
      raise OSError(f"{source} has {expected} bytes, its copy in {folder} {got}")
    part.replace(folder / source.name)
  except BaseException:  # also Ctrl-C: nobody would remove the part
    part.unlink(missing_ok=True)
    raise


def megabytes(size: int) -> str:
  """Format a number of bytes in megabytes (10^6 bytes)."""
  return f"{size / 1e6:.1f} MB"
