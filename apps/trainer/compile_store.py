"""A folder, local or gs://, in which machines share compiled programs; see `compile_cache`."""

from collections.abc import Callable, Mapping
import concurrent.futures
from pathlib import Path
import re
import secrets
from typing import NamedTuple

from etils import epath
import jax

SUFFIX = "-cache"  # of an entry's file
ENTRY = re.compile(rf"[^/]+-[0-9a-f]{{64}}{SUFFIX}")
_FETCH_BYTES = 4 * 10**9  # newest entries of a store up to this size are copied


class Store:
  """Entries in sub-folders of one version of JAX and one kind of devices.

  Attributes:
    place: the folder.
  """

  def __init__(self, place: str, say: Callable[[str], None]):
    """Touch nothing yet; `say` prints a line."""
    self.place = epath.Path(place).expanduser()
    self._say = say
    self._pushed: set[str] = set()

  def fetch(self, folder: Path) -> None:
    """Copy entries that are missing in a local folder."""
    store = self.place / _kind()
    found = _entries(store)
    if not found:
      self._say(f"compile store {store}: no programs for these devices yet")
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
    self._say(
      f"compile store {store}: {len(wanted)} of {len(found)} programs fetched "
      f"({megabytes(total)}), {here} were here"
      + (f", {left} older ones left there" if left else "")
    )

  def push(self, folder: Path, names: Mapping[str, bool]) -> None:
    """Copy entries of a local folder that the store lacks.

    Args:
      folder: the local folder.
      names: of entries; True replaces one that may have come damaged from the store.
    """
    store = self.place / _kind()
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
      self._say(f"compile store {store}: {len(sent)} programs kept ({megabytes(size)})")


class _Entry(NamedTuple):
  name: str
  size: int  # bytes
  changed: float  # seconds since 1970


def _kind() -> str:
  """The sub-folder of a store for entries that may fit these devices."""
  kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
  return f"jax-{jax.__version__}/{kind}-{jax.device_count()}"


def _entries(store: epath.Path) -> list[_Entry]:
  if not store.is_dir():
    return []
  paths = [path for path in store.iterdir() if ENTRY.fullmatch(path.name)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:  # stat is a request each on gs://
    stats = pool.map(lambda path: path.stat(), paths)
    return [_Entry(p.name, s.length, s.mtime) for p, s in zip(paths, stats, strict=True)]


def _copy(source: epath.Path, folder: epath.Path) -> None:
  """Copies an entry under a temporary name, checks its size, then gives it its own name."""
  part = folder / f"part-{secrets.token_hex(8)}"
  try:
    source.copy(part, overwrite=True)
    expected, got = source.stat().length, part.stat().length
    if got != expected:
      raise OSError(f"{source} has {expected} bytes, its copy in {folder} {got}")
    part.replace(folder / source.name)
  except Exception:
    part.unlink(missing_ok=True)
    raise


def megabytes(size: int) -> str:
  """Bytes in units of 10^6."""
  return f"{size / 1e6:.1f} MB"
