"""Description of a shard format: names of its files, and how to find the records of a file."""

from collections.abc import Callable, Iterable
import dataclasses
import re
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ov_data import fs, records


class Damage(NamedTuple):
  """A damaged byte range of a shard.

  Attributes:
    offset: first byte of the range; first data byte if the record header is valid.
    length: number of bytes.
    reason: short phrase for counting.
    records: number of records in the range; None if unknown (at least 1).
  """

  offset: int
  length: int
  reason: str
  records: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
  """Positions of consecutive records of a shard.

  Attributes:
    offsets: offset of the data of each record in bytes, uint64 [n].
    lengths: length of the data of each record in bytes, uint32 [n].
    checksums: checksum of the headers of each record, uint32 [n]; None if the format stores
      checksums itself.
  """

  offsets: NDArray[np.uint64]
  lengths: NDArray[np.uint32]
  checksums: NDArray[np.uint32] | None = None

  def __len__(self) -> int:
    return len(self.offsets)

  def __getitem__(self, part: slice) -> "Columns":
    checksums = None if self.checksums is None else self.checksums[part]
    return Columns(self.offsets[part], self.lengths[part], checksums)


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
  """Content of a shard.

  Attributes:
    records: number of valid records.
    damage: damaged ranges.
    columns: positions of the records; None if the files of the format contain their own index.
  """

  records: int
  damage: tuple[Damage, ...] = ()
  columns: Columns | None = None

  @classmethod
  def of(
    cls,
    entries: Iterable[tuple[int, int, int]],
    damage: Iterable[Damage],
    *,
    has_checksums: bool = False,
  ) -> Self:
    """Return a scan from the offset, length and header checksum of each record."""
    table = np.array([*entries], np.uint64).reshape(-1, 3)
    checksums = table[:, 2].astype(np.uint32) if has_checksums else None
    columns = Columns(table[:, 0].copy(), table[:, 1].astype(np.uint32), checksums)
    return cls(len(table), tuple(damage), columns)


@dataclasses.dataclass(frozen=True)
class ShardKind:
  """A format of shards.

  Attributes:
    name: name of the format, for messages.
    suffix: usual end of the file names, for messages.
    names: pattern of the file names.
    scan: function that finds the records of a shard, given its path and size.
    before, after: bytes of the framing before and after the data of a record.
    has_columns: whether the index stores the position of each record.
    has_checksums: whether the index stores a checksum of the headers of each record.
    is_framed: whether the records of an undamaged shard fill it without gaps.
  """

  name: str
  suffix: str
  names: re.Pattern[str]
  scan: Callable[[str, int], Scan]
  before: int = 0
  after: int = 0
  has_columns: bool = True
  has_checksums: bool = False
  is_framed: bool = False

  @property
  def bytes_per_record(self) -> int:
    """Size of the index of a record in bytes."""
    return (12 + 4 * self.has_checksums) * self.has_columns


def scan_tfrecord(path: str, size: int) -> Scan:
  """Find the records of a TFRecord file and verify both checksums of each."""
  with fs.open_read(path) as stream:
    found = list(records.scan(stream, size))
  good = ((entry.offset, entry.length, 0) for entry in found if entry.damage is None)
  damage = (Damage(e.offset, e.length, e.damage, e.records) for e in found if e.damage)
  return Scan.of(good, damage)


TFRECORD = ShardKind(
  "TFRecord",
  ".tfrecord*",
  re.compile(r".*\.tfrec(ord)?s?([-.].*)?", re.S),
  scan_tfrecord,
  before=records.HEADER_BYTES,
  after=records.FOOTER_BYTES,
  is_framed=True,
)
