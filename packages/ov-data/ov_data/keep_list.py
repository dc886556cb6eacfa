"""Keep-lists: the records of a source that training uses, one bit each, without rewritten shards.

    one line of JSON: format, source, records, kept, dropped by reason, sha256
    bit i % 8 of byte i // 8 is 1 if record i is kept; zeros fill the last block of 64 bytes

The checksum covers the bits and all other values of the header. Counts of kept records before each
block of 512 bits answer both look-ups in microseconds and take an eighth of the memory of the bits.
"""

from collections.abc import Mapping
import hashlib
import json
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ov_data import fs

FORMAT = "ov_data keep-list 1"
_BLOCK_BYTES = 64
_BLOCK = 8 * _BLOCK_BYTES
_STEP = _BLOCK_BYTES << 14  # bytes counted at a time
_MAX_BYTES = 16 << 30
_REMEDY = "copy it again, or write it again with //tools/data:keep"


class Located(Protocol):
  """A `RecordSource`, or a `Dataset` without keep-list."""

  @property
  def fingerprint(self) -> str:
    """Hex digits that depend on the content."""

  def __len__(self) -> int:
    """Return the number of records."""

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file of a record and its offset in the file."""


class KeepList:
  """The kept records of a source, numbered from 0 in the order of the source.

  Args:
    source: identity of the source, see `identity`.
    kept: whether each record is kept, bool [n].
    dropped: number of dropped records by reason.

  Attributes:
    source: identity of the source.
    records: number of records n of the source.
    dropped: number of dropped records by reason.

  Raises:
    ValueError: if no record is kept, or the counts of `dropped` do not match `kept`.

  Examples:
    >>> import numpy as np
    >>> import ov_data
    >>> keep = ov_data.KeepList("", np.array([True, False, True]), {"too small": 1})
    >>> len(keep), keep[1], keep.rank(2)
    (2, 2, 1)
  """

  def __init__(self, source: str, kept: NDArray[np.bool_], dropped: Mapping[str, int]):
    bits = np.zeros(_padded_bytes(len(kept)), np.uint8)
    packed = np.packbits(kept, bitorder="little")
    bits[: len(packed)] = packed
    self._set(source, len(kept), dropped, bits)

  def _set(
    self, source: str, records: int, dropped: Mapping[str, int], bits: NDArray[np.uint8]
  ) -> None:
    self.source, self.records, self.dropped = source, records, dict(dropped)
    self._bits = bits
    self._before = _counts_before(bits)
    if len(self) + sum(dropped.values()) != records:
      raise ValueError(
        f"{len(self):,} kept and {sum(dropped.values()):,} dropped records, but the source has "
        f"{records:,}; count every dropped record under one reason"
      )
    if not len(self):
      raise ValueError(
        f"all {records:,} records are dropped ({_reasons(dropped)}); keep at least 1"
      )

  @classmethod
  def read(cls, path: str) -> Self:
    """Read a keep-list and verify its checksum; the path may be remote.

    Raises:
      ValueError: if the file is not a keep-list, or is truncated or damaged.
      OSError: if the file cannot be read.
    """
    try:
      data = fs.read_regular(path, _MAX_BYTES)
    except FileNotFoundError as error:
      raise ValueError(f"keep_list={path}: there is no such file ({error}); {_REMEDY}") from None
    stop = data.find(b"\n", 0, 1 << 20)
    try:
      header = json.loads(data[: max(0, stop)])
      if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r:.40}, expected {FORMAT!r}")
      source, records, dropped = header["source"], header["records"], header["dropped"]
      bits = np.frombuffer(data, np.uint8, offset=stop + 1)
      if len(bits) != (size := _padded_bytes(records)):
        raise ValueError(f"{len(bits):,} bytes for {records:,} records, expected {size:,}")
      if header["sha256"] != _sha256(header, bits):
        raise ValueError("its sha256 does not match its content")
      keep = cls.__new__(cls)
      keep._set(source, records, dropped, bits)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
      raise ValueError(
        f"keep_list={path}: not a usable keep-list ({type(error).__name__}: {error}); {_REMEDY}"
      ) from None
    return keep

  def write(self, path: str) -> None:
    """Write the file atomically.

    Raises:
      OSError: if the file cannot be written.
    """
    header = {
      "format": FORMAT, "source": self.source, "records": self.records, "kept": len(self),
      "dropped": self.dropped,
    }  # fmt: skip
    line = json.dumps({**header, "sha256": _sha256(header, self._bits)})
    fs.write_atomic(path, line.encode() + b"\n" + self._bits.tobytes())

  def check_fits(self, records: Located, path: str) -> None:
    """Check that the keep-list was written for a source.

    Args:
      records: the source.
      path: path of the keep-list, for the message.

    Raises:
      ValueError: if the source has other shards, records or slices.
    """
    if len(records) != self.records:
      raise ValueError(
        f"keep_list={path} is for a source of {self.records:,} records, and this one has "
        f"{len(records):,}; write a keep-list for this source and split with //tools/data:keep"
      )
    if (found := identity(records)) != self.source:
      raise ValueError(
        f"keep_list={path} is for the source {self.source}, and this one is {found}; write a "
        "keep-list for this source and split with //tools/data:keep"
      )

  def __len__(self) -> int:
    """Return the number of kept records."""
    return int(self._before[-1])

  def __getitem__(self, number: int) -> int:
    """Return the record of the kept record `number`."""
    if not 0 <= number < len(self):
      raise IndexError(f"number={number}: expected 0 to {len(self) - 1}")
    block = int(self._before.searchsorted(number, "right")) - 1
    bits = np.unpackbits(self._block(block), bitorder="little")
    return block * _BLOCK + int(bits.nonzero()[0][number - self._before[block]])

  def rank(self, record: int) -> int:
    """Return the number of a kept record, the inverse of `keep[number]`.

    Raises:
      ValueError: if the record is dropped.
    """
    block, bit = divmod(record, _BLOCK)
    bits = int.from_bytes(self._block(block).tobytes(), "little")
    if not bits >> bit & 1:
      raise ValueError(f"record {record} is dropped by the keep-list")
    return int(self._before[block]) + (bits & ((1 << bit) - 1)).bit_count()

  @property
  def kept(self) -> NDArray[np.bool_]:
    """Whether each record is kept, bool [n]."""
    return np.unpackbits(self._bits, count=self.records, bitorder="little").astype(bool)

  @property
  def fingerprint(self) -> str:
    """16 hex digits of the source and the kept records, not of the reasons."""
    return _sha256({"source": self.source, "records": self.records}, self._bits)[:16]

  @property
  def nbytes(self) -> int:
    """Size of bits and counts in memory, in bytes."""
    return self._bits.nbytes + self._before.nbytes

  def _block(self, block: int) -> NDArray[np.uint8]:
    return self._bits[block * _BLOCK_BYTES : (block + 1) * _BLOCK_BYTES]


def identity(records: Located) -> str:
  """Return 16 hex digits of a source: its content, and the range of records that a slice selects.

  Args:
    records: the source.
  """
  ends = []
  for record in (0, len(records) - 1):
    file, offset = records.locate(record)
    ends.append((fs.basename(file), offset))
  content = json.dumps([records.fingerprint, len(records), ends])
  return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _padded_bytes(records: int) -> int:
  return -(-records // _BLOCK) * _BLOCK_BYTES


def _counts_before(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
  """Return the number of kept records before each block, and the total, int64 [blocks + 1]."""
  before = np.zeros(len(bits) // _BLOCK_BYTES + 1, np.int64)
  for first in range(0, len(bits), _STEP):
    part = np.bitwise_count(bits[first : first + _STEP]).reshape(-1, _BLOCK_BYTES)
    block = first // _BLOCK_BYTES
    before[block + 1 : block + 1 + len(part)] = part.sum(axis=1, dtype=np.int64)
  return np.cumsum(before, out=before)


def _sha256(header: Mapping[str, Any], bits: NDArray[np.uint8]) -> str:
  content = {key: value for key, value in header.items() if key != "sha256"}
  digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
  digest.update(bits.data)
  return digest.hexdigest()


def _reasons(dropped: Mapping[str, int]) -> str:
  return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
