"""Loading and building of shard indexes.

A sidecar is valid while size and fingerprint (checksum of the first and last 64 KiB) match the
shard. It therefore remains valid after copying, and a rewritten shard is indexed again. If the data
directory is remote or read-only, indexes are stored in $OV_DATA_CACHE, by default ~/.cache/ov_data.

The positions of the records are read from a local sidecar when they are needed. The facts about the
shards of a large data set are also stored in one file, see `ov_data.index.catalog`.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import logging
import os

import google_crc32c

from ov_data import fs
from ov_data.index import catalog, sidecar
from ov_data.index.cache import cache_path
from ov_data.index.kind import TFRECORD, ShardKind
from ov_data.index.sidecar import ShardIndex

_EDGE_BYTES = 64 << 10
_WORKERS, _REMOTE_WORKERS = 16, 64  # I/O-bound threads
_MIN_SIDECAR_BYTES = 1 << 20  # size limit of a sidecar, or the size of its shard if larger
_CATALOG_SHARDS = 100  # smaller data sets open quickly without a catalog

Progress = Callable[[int, int], None]  # bytes done, total bytes

log = logging.getLogger("ov_data")


def load_index(path: str, kind: ShardKind = TFRECORD, *, verify: bool = False) -> ShardIndex:
  """Return the index of a shard from its sidecar, or build and store it.

  Args:
    path: path of the shard.
    kind: format of the shard.
    verify: whether to read the shard even if it has a valid sidecar.

  Raises:
    OSError: if the shard is not a regular file or cannot be read.
  """
  reader = fs.Reader(path)
  size = reader.size()
  fingerprint = _fingerprint(reader, size)
  if not kind.has_columns:
    return _build(path, size, fingerprint, kind)
  for location in () if verify else _locations(path):
    index = _read_sidecar(location, path, size, kind)
    if index is not None and (index.size, index.fingerprint) == (size, fingerprint):
      return _store(index, [cache_path(path)]) if fs.is_remote(location) else index
  index = _build(path, size, fingerprint, kind)
  if index.damage and not len(index):
    return index  # not a shard: do not store an index
  return _store(index, _locations(path))


def load_indexes(
  paths: Sequence[str], progress: Progress | None = None, kind: ShardKind = TFRECORD
) -> Sequence[ShardIndex]:
  """Return the indexes of many shards, read in parallel; log damaged byte ranges.

  Args:
    paths: paths of the shards.
    progress: callback (bytes done, total bytes), called from this thread as shards finish.
    kind: format of the shards.

  Raises:
    OSError: if a shard is not a regular file or cannot be read.
  """
  is_large = len(paths) >= _CATALOG_SHARDS
  table, known = catalog.load(paths, kind) if is_large else (None, {})
  indexes: Sequence[ShardIndex] = table if table is not None else []
  if table is None:
    missing = [path for path in paths if path not in known]
    known |= dict(zip(missing, _load_each(missing, progress, kind)))
    indexes = [known[path] for path in paths]
    if is_large:
      catalog.store(indexes, kind)
  for index in catalog.damaged(indexes):
    for damage in index.damage[:3]:
      log.warning(
        "%s: damaged at byte %d: %s (%d bytes)",
        fs.printable(index.path),
        damage.offset,
        damage.reason,
        damage.length,
      )
    count, path = len(index.damage), fs.printable(index.path)
    log.warning("%s: %d damaged, %d usable records", path, count, len(index))
  return indexes


def _load_each(
  paths: Sequence[str], progress: Progress | None, kind: ShardKind
) -> list[ShardIndex]:
  workers = _REMOTE_WORKERS if any(map(fs.is_remote, paths)) else _WORKERS
  with futures.ThreadPoolExecutor(workers, "ov-index") as pool:
    sizes = list(pool.map(fs.size, paths)) if progress else [0] * len(paths)
    tasks = {pool.submit(load_index, path, kind): size for path, size in zip(paths, sizes)}
    try:
      done = 0
      for task in futures.as_completed(tasks):
        task.result()
        done += tasks[task]
        if progress:
          progress(done, sum(sizes))
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  return [task.result() for task in tasks]


def _locations(path: str) -> list[str]:
  """Return where the sidecar of a shard may be stored, the best location first."""
  locations = [path + sidecar.SUFFIX, cache_path(path)]
  return locations[::-1] if fs.is_remote(path) else locations


def _store(index: ShardIndex, locations: Sequence[str]) -> ShardIndex:
  """Store an index in the first location that is writable, remote ones also next to the shard.

  Returns:
    The index with its positions in the local sidecar; in memory if it could not be stored.
  """
  data = sidecar.serialise(index)
  stored = index
  for location in locations:
    if stored is not index and not fs.is_remote(location):
      break
    try:
      if location == cache_path(index.path):
        fs.make_folder(os.path.dirname(location))
      fs.write_atomic(location, data)
    except OSError as error:
      log.info("the index of %s cannot be stored at %s (%s)", index.path, location, error)
      continue
    if not fs.is_remote(location):
      stored = sidecar.stored_at(index, location, len(data))
  if stored is index:
    log.warning("the index of %s cannot be stored and will be rebuilt by the next run", index.path)
  return stored


def _read_sidecar(location: str, path: str, size: int, kind: ShardKind) -> ShardIndex | None:
  """Return the index stored at `location`; None if there is no valid one."""
  try:
    data = fs.read_regular(location, _MIN_SIDECAR_BYTES + size)
  except FileNotFoundError:
    return None
  except OSError as error:
    log.warning("the index at %s cannot be read (%s) and is rebuilt", location, error)
    return None
  try:
    index = sidecar.parse(path, data, kind)
  except sidecar.OtherFormat:
    log.info("the index at %s has another format and is rebuilt", location)
    return None
  except ValueError as error:
    log.warning("the index at %s is damaged (%s) and is rebuilt", location, error)
    return None
  return index if fs.is_remote(location) else sidecar.stored_at(index, location, len(data))


def _build(path: str, size: int, fingerprint: int, kind: ShardKind) -> ShardIndex:
  found = kind.scan(path, size)
  index = ShardIndex(path, size, fingerprint, found.records, found.damage, kind)
  if found.columns is None:
    return index
  return dataclasses.replace(index, columns=found.columns, total=found.records)


def _fingerprint(reader: fs.Reader, size: int) -> int:
  head = reader.read(0, _EDGE_BYTES)
  tail = reader.read(max(0, size - _EDGE_BYTES), _EDGE_BYTES)
  return google_crc32c.value(head + tail)
