"""Indexes of shards: loaded from their sidecars, or built by reading the shards once.

A sidecar is used as long as size and fingerprint (checksum of the first and last 64 KiB) fit the
shard, so it survives copying, and a rewritten shard is indexed again. Where the data directory is
read-only the index goes to $OV_DATA_CACHE, else ~/.cache/ov_data.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import hashlib
import logging
import os

import google_crc32c
import numpy as np

from ov_data import fs, records
from ov_data.index import sidecar
from ov_data.index.sidecar import Damage, ShardIndex

_EDGE_BYTES = 64 << 10
_WORKERS, _REMOTE_WORKERS = 16, 64  # threads: they wait on disk or network most of the time
_MIN_SIDECAR_BYTES = 1 << 20  # read of any sidecar; one of a large shard may have its size

Progress = Callable[[int, int], None]  # bytes done, bytes in all

log = logging.getLogger("ov_data")


def load_index(path: str, *, verify: bool = False) -> ShardIndex:
  """Return the index of a shard: from its sidecar where that fits, else built and stored.

  Args:
    path: of the shard.
    verify: whether to read the shard even where a sidecar fits.

  Raises:
    OSError: the shard is no regular file, or cannot be read.
  """
  reader = fs.Reader(path)
  size = reader.size()
  fingerprint = _fingerprint(reader, size)
  beside = path + sidecar.SUFFIX
  places = (lambda: beside, lambda: _cache_path(path))  # a hash, for those that need it
  for find in () if verify else places:
    index = _read_sidecar(find(), path, size)
    if index is not None and (index.size, index.fingerprint) == (size, fingerprint):
      return index
  index = _build(path, size, fingerprint)
  if index.damage and not len(index):
    return index  # no shard at all: leave no file next to it
  data = sidecar.serialise(index)
  for place in (beside, _cache_path(path)):
    try:
      if place != beside:
        fs.make_folder(os.path.dirname(place))
      fs.write_atomic(place, data)
      return index
    except OSError as error:
      log.info("the index of %s cannot be stored at %s (%s)", path, place, error)
  log.warning("the index of %s cannot be stored and will be built again by the next run", path)
  return index


def load_indexes(paths: Sequence[str], progress: Progress | None = None) -> list[ShardIndex]:
  """Return the indexes of many shards, read in parallel; damage is logged with its bytes.

  Args:
    paths: of the shards.
    progress: called with (bytes of shards done, bytes in all) as they finish, from this thread.

  Raises:
    OSError: a shard is no regular file, or cannot be read.
  """
  workers = _REMOTE_WORKERS if any(map(fs.is_remote, paths)) else _WORKERS
  with futures.ThreadPoolExecutor(workers, "ov-index") as pool:
    sizes = list(pool.map(fs.size, paths)) if progress else [0] * len(paths)
    tasks = {pool.submit(load_index, path): size for path, size in zip(paths, sizes)}
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
  indexes = [task.result() for task in tasks]
  for index in indexes:
    for damage in index.damage[:3]:
      log.warning(
        "%s: damaged at byte %d: %s (%d bytes)",
        fs.printable(index.path),
        damage.offset,
        damage.reason,
        damage.length,
      )
    if index.damage:
      count, path = len(index.damage), fs.printable(index.path)
      log.warning("%s: %d damaged, %d usable records", path, count, len(index))
  return indexes


def fingerprint_of(path: str) -> tuple[int, int]:
  """Return the size of a shard and the checksum of its edges.

  Raises:
    OSError: the shard is no regular file, or cannot be read.
  """
  reader = fs.Reader(path)
  size = reader.size()
  return size, _fingerprint(reader, size)


def _read_sidecar(place: str, path: str, size: int) -> ShardIndex | None:
  """Return the index stored at `place`; None if there is none that can be used."""
  try:
    data = fs.read_regular(place, _MIN_SIDECAR_BYTES + size)
  except FileNotFoundError:
    return None
  except OSError as error:
    log.warning("the index at %s cannot be read (%s) and is built again", place, error)
    return None
  try:
    return sidecar.parse(path, data)
  except sidecar.OtherFormat:
    log.info("the index at %s is of another format and is built again", place)
    return None
  except ValueError as error:
    log.warning("the index at %s is damaged (%s) and is built again", place, error)
    return None


def _build(path: str, size: int, fingerprint: int) -> ShardIndex:
  with fs.open_read(path) as stream:
    entries = list(records.scan(stream, size))
  good = [entry for entry in entries if entry.damage is None]
  return ShardIndex(
    path,
    size,
    fingerprint,
    np.array([entry.offset for entry in good], np.uint64),
    np.array([entry.length for entry in good], np.uint32),
    tuple(Damage(e.offset, e.length, e.damage, e.records) for e in entries if e.damage),
  )


def _fingerprint(reader: fs.Reader, size: int) -> int:
  head = reader.read(0, _EDGE_BYTES)
  tail = reader.read(max(0, size - _EDGE_BYTES), _EDGE_BYTES)
  return google_crc32c.value(head + tail)


def _cache_path(path: str) -> str:
  root = os.environ.get("OV_DATA_CACHE") or os.path.expanduser("~/.cache/ov_data")
  whole = path if fs.is_remote(path) else os.path.abspath(path)
  name = hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()[:32]
  return os.path.join(root, name + sidecar.SUFFIX)
