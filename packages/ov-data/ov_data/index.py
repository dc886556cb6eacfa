"""The sidecar index: where every record of a shard lies, found once, with both checksums verified.

Beside `train-00000.tfrecord` lies `train-00000.tfrecord.ovidx`:

    one line of JSON: format, shard size and fingerprint, number of records, damage
    uint64 offsets[n] | uint32 lengths[n]       little-endian

A sidecar is used as long as size and fingerprint (checksum of the first and last 64 KiB) fit the
shard, so it survives copying, and a rewritten shard is indexed anew. Where the data directory is
read-only the index goes to $OV_DATA_CACHE, else ~/.cache/ov_data.

`python -m ov_data.index DIR_OR_GLOB...` builds the sidecars ahead of a run.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import hashlib
import json
import logging
import os
import sys

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ov_data import fs, records

SUFFIX = ".ovidx"
FORMAT = "ov_data index 1"
_EDGE_BYTES = 64 << 10
_WORKERS, _REMOTE_WORKERS = 16, 64  # threads: they wait on disk or network most of the time

Progress = Callable[[int, int], None]  # bytes done, bytes in all

log = logging.getLogger("ov_data")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
  """The usable records of one shard, and what is damaged in it."""

  path: str
  size: int  # bytes of the shard
  fingerprint: int  # crc32c of its first and last 64 KiB
  offsets: NDArray[np.uint64]  # [n] of the data, behind the record header
  lengths: NDArray[np.uint32]  # [n]
  damage: tuple[tuple[int, str], ...] = ()  # offset, reason

  def __len__(self) -> int:
    return len(self.offsets)


def load_index(path: str) -> ShardIndex:
  """The index of a shard: from its sidecar where that still fits, else built and stored."""
  size = fs.size(path)
  fingerprint = _fingerprint(path, size)
  places = (path + SUFFIX, _cache_path(path))
  for place in places:
    if fs.exists(place):
      index = _parse(path, fs.read_bytes(place))
      if index is not None and (index.size, index.fingerprint) == (size, fingerprint):
        return index
  index = _build(path, size, fingerprint)
  data = serialise(index)
  for place in places:
    try:
      if place != places[0]:
        os.makedirs(os.path.dirname(place), exist_ok=True)
      fs.write_atomic(place, data)
      return index
    except OSError as error:
      log.info("the index of %s cannot be stored at %s (%s)", path, place, error)
  log.warning("the index of %s cannot be stored and will be built again by the next run", path)
  return index


def load_indexes(paths: Sequence[str], progress: Progress | None = None) -> list[ShardIndex]:
  """The indexes of many shards, in parallel; damage is logged with shard, offset and reason.

  `progress(done, total)` is called in bytes of shards as they finish, from this thread.
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
    for offset, reason in index.damage[:3]:
      log.warning("%s: damaged at byte %d: %s", index.path, offset, reason)
    if index.damage:
      log.warning("%s: %d damaged, %d usable records", index.path, len(index.damage), len(index))
  return indexes


def serialise(index: ShardIndex) -> bytes:
  """The bytes of a sidecar."""
  payload = index.offsets.astype("<u8").tobytes() + index.lengths.astype("<u4").tobytes()
  header = {
    "format": FORMAT,
    "size": index.size,
    "fingerprint": index.fingerprint,
    "records": len(index),
    "damage": index.damage,
    "checksum": google_crc32c.value(payload),
  }
  return json.dumps(header).encode() + b"\n" + payload


def _parse(path: str, data: bytes) -> ShardIndex | None:
  """The index in a sidecar; None if it is of another format or itself damaged."""
  line, _, payload = data.partition(b"\n")
  try:
    header = json.loads(line)
    count = header["records"]
    if (header["format"], header["checksum"]) != (FORMAT, google_crc32c.value(payload)):
      return None
    offsets = np.frombuffer(payload, "<u8", count)
    lengths = np.frombuffer(payload, "<u4", count, 8 * count)
    damage = tuple((offset, reason) for offset, reason in header["damage"])
    return ShardIndex(path, header["size"], header["fingerprint"], offsets, lengths, damage)
  except (ValueError, KeyError, TypeError):
    return None


def _build(path: str, size: int, fingerprint: int) -> ShardIndex:
  with fs.open_read(path) as stream:
    entries = list(records.scan(stream))
  good = [entry for entry in entries if entry.damage is None]
  return ShardIndex(
    path,
    size,
    fingerprint,
    np.array([entry.offset for entry in good], np.uint64),
    np.array([entry.length for entry in good], np.uint32),
    tuple((entry.offset, entry.damage) for entry in entries if entry.damage),
  )


def _fingerprint(path: str, size: int) -> int:
  reader = fs.Reader(path)
  head = reader.read(0, _EDGE_BYTES)
  tail = reader.read(max(0, size - _EDGE_BYTES), _EDGE_BYTES)
  return google_crc32c.value(head + tail)


def _cache_path(path: str) -> str:
  root = os.environ.get("OV_DATA_CACHE") or os.path.expanduser("~/.cache/ov_data")
  whole = path if fs.is_remote(path) else os.path.abspath(path)
  return os.path.join(root, hashlib.sha256(whole.encode()).hexdigest()[:32] + SUFFIX)


def main(arguments: list[str]) -> None:
  from ov_data import shards  # which imports this module

  if not arguments:
    sys.exit("usage: python -m ov_data.index DIR_OR_GLOB...")
  for argument in arguments:
    try:
      paths = shards.find_shards(fs.join(argument, "*") if fs.is_dir(argument) else argument)
    except ValueError as error:
      sys.exit(str(error))

    def show(done: int, total: int) -> None:
      if sys.stderr.isatty():
        print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr)

    indexes = load_indexes(paths, show)
    damage = sum(len(index.damage) for index in indexes)
    print(
      f"\r{argument}: {sum(map(len, indexes))} records in {len(indexes)} shards, {damage} damaged"
    )


if __name__ == "__main__":
  logging.basicConfig(format="%(message)s")
  main(sys.argv[1:])
