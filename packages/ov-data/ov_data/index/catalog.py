"""Catalog: facts about all shards of a large data set, in one local file.

Without it, opening 100,000 shards reads both edges and the sidecar of each. With it, opening reads
one file, and the size and times of each shard. The catalog is only a cache: a shard that it does
not describe, or that changed, is loaded as usual.

    one line of JSON: format, paths, damage
    int64 [shards, 8] | uint32 crc32c of all previous bytes                         little-endian
"""

from collections.abc import Mapping, Sequence
import json
import logging
import os
from typing import Any, overload

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ov_data import fs
from ov_data.index import cache
from ov_data.index.kind import Damage, ShardKind
from ov_data.index.sidecar import CHECKSUM_BYTES, SUFFIX, ShardIndex, parse_damage

FORMAT = "ov_data catalog 1"
_SUFFIX = ".ovcat"
_MAX_BYTES = 4 << 30
_COLUMNS = 8  # size, three stamps, fingerprint, records, start of the positions, is in the cache
_RECORDS, _START, _CACHED = 5, 6, 7
_STEP = 10_000  # shards whose status is read at a time

log = logging.getLogger("ov_data")


class IndexTable(Sequence[ShardIndex]):
  """Indexes of many shards in one array, which takes 64 bytes for each shard and its path.

  Args:
    paths: paths of the shards.
    kind: format of the shards.
    table: facts about each shard, int64 [n, 8].
    damage: damaged ranges by number of the shard.
  """

  def __init__(
    self,
    paths: Sequence[str],
    kind: ShardKind,
    table: NDArray[np.int64],
    damage: Mapping[int, tuple[Damage, ...]],
  ):
    self._paths, self._kind, self._table, self._damage = paths, kind, table, damage

  def __len__(self) -> int:
    return len(self._paths)

  @overload
  def __getitem__(self, number: int) -> ShardIndex: ...
  @overload
  def __getitem__(self, number: slice) -> list[ShardIndex]: ...
  def __getitem__(self, number: int | slice) -> ShardIndex | list[ShardIndex]:
    if isinstance(number, slice):
      return [self[i] for i in range(*number.indices(len(self)))]
    path, has_columns = self._paths[number], self._kind.has_columns
    size, _, _, _, fingerprint, records, start, is_cached = self._table[number].tolist()
    sidecar = _sidecar(path, is_cached) if has_columns else ""
    damage = self._damage.get(number, ())
    return ShardIndex(path, size, fingerprint, records, damage, self._kind, sidecar, start, records)

  @property
  def paths(self) -> Sequence[str]:
    """Path of each shard."""
    return self._paths

  @property
  def counts(self) -> list[int]:
    """Number of records of each shard."""
    return self._table[:, _RECORDS].tolist()

  @property
  def damaged(self) -> list[ShardIndex]:
    """Indexes of the shards with damage."""
    return [self[number] for number in self._damage]


def counts(indexes: Sequence[ShardIndex]) -> list[int]:
  """Return the number of records of each shard."""
  return indexes.counts if isinstance(indexes, IndexTable) else [*map(len, indexes)]


def paths_of(indexes: Sequence[ShardIndex]) -> Sequence[str]:
  """Return the path of each shard."""
  return indexes.paths if isinstance(indexes, IndexTable) else [index.path for index in indexes]


def damaged(indexes: Sequence[ShardIndex]) -> list[ShardIndex]:
  """Return the indexes of the shards with damage."""
  if isinstance(indexes, IndexTable):
    return indexes.damaged
  return [index for index in indexes if index.damage]


def load(paths: Sequence[str], kind: ShardKind) -> tuple[IndexTable | None, dict[str, ShardIndex]]:
  """Return the catalog of the shards.

  Returns:
    The indexes of all shards, or None if the catalog is missing or a shard changed; and the valid
    indexes by path in that case.
  """
  location = _location(paths, kind)
  try:
    data = fs.read_regular(location, _MAX_BYTES)
  except OSError:
    return None, {}
  try:
    header, table = _parse(data, len(paths))
  except ValueError as error:
    log.warning("the catalog at %s is damaged (%s) and is rebuilt", location, error)
    return None, {}
  damage = {
    int(number): tuple(parse_damage(*item) for item in items)
    for number, items in header["damage"].items()
  }
  all_indexes = IndexTable(paths, kind, table, damage)
  is_valid = np.zeros(len(paths), bool)
  sizes = table[:, _START] + kind.bytes_per_record * table[:, _RECORDS] + CHECKSUM_BYTES
  for first in range(0, len(paths), _STEP):
    part = paths[first : first + _STEP]
    for number, status in enumerate(fs.statuses(part), first):
      is_valid[number] = status is not None and status == tuple(table[number, :4].tolist())
      if is_valid[number] and kind.has_columns:
        sidecar = _sidecar(paths[number], int(table[number, _CACHED]))
        is_valid[number] = _has_size(sidecar, int(sizes[number]))
  if is_valid.all():
    return all_indexes, {}
  return None, {paths[number]: all_indexes[number] for number in np.flatnonzero(is_valid).tolist()}


def store(indexes: Sequence[ShardIndex], kind: ShardKind) -> None:
  """Store the catalog of a data set, best effort."""
  paths = [index.path for index in indexes]
  table = np.zeros((len(indexes), _COLUMNS), np.int64)
  damage: dict[str, Sequence[object]] = {}
  for number, (index, status) in enumerate(zip(indexes, fs.statuses(paths), strict=True)):
    if status is None or status[0] != index.size or (kind.has_columns and not index.sidecar):
      status = (-1, 0, 0, 0)  # load it as usual
    is_cached = index.sidecar != index.path + SUFFIX
    table[number] = (*status, index.fingerprint, index.records, index.start, is_cached)
    if index.damage:
      damage[str(number)] = index.damage
  line = json.dumps({"format": FORMAT, "shards": len(indexes), "damage": damage}).encode()
  content = line + b"\n" + table.astype("<i8").tobytes()
  data = content + google_crc32c.value(content).to_bytes(CHECKSUM_BYTES, "little")
  location = _location(paths, kind)
  try:
    fs.make_folder(cache.folder())
    fs.write_atomic(location, data)
  except OSError as error:
    log.info("the catalog cannot be stored at %s (%s)", location, error)
    return
  positions = kind.bytes_per_record * sum(map(len, indexes))
  log.info("indexes of %d shards: %.1f MB, catalog %s", len(indexes), positions / 1e6, location)


def _parse(data: bytes, shards: int) -> tuple[Mapping[str, Any], NDArray[np.int64]]:
  content, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
  if int.from_bytes(checksum, "little") != google_crc32c.value(content):
    raise ValueError("checksum")
  line, _, payload = content.partition(b"\n")
  header = json.loads(line)
  if header["format"] != FORMAT or header["shards"] != shards:
    raise ValueError("another format")
  return header, np.frombuffer(payload, "<i8").reshape(shards, _COLUMNS)


def _location(paths: Sequence[str], kind: ShardKind) -> str:
  whole = "\0".join(path if fs.is_remote(path) else os.path.abspath(path) for path in paths)
  return os.path.join(cache.folder(), cache.hash_of(f"{kind.name}\0{whole}") + _SUFFIX)


def _sidecar(path: str, is_cached: int) -> str:
  return cache.cache_path(path) if is_cached else path + SUFFIX


def _has_size(sidecar: str, size: int) -> bool:
  """Return whether the sidecar has the expected size; its content was verified before."""
  try:
    return os.stat(sidecar).st_size == size
  except OSError:
    return False
