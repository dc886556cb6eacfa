"""New captions of a source for training, found by record in memory-mapped files.

//tools/data:recaption writes these files next to its Parquet files, which have the same captions:

    recaptions.bin       for each record a JSON list of its captions, and its crc32c in 4 bytes
    recaptions.offsets   n + 1 integers of 64 bits: where each of n records begins, and the end
    recaptions.json      written last: identity of the source, number of records, fingerprint

The files are mapped, not read: they take no private memory, and processes share their pages.
"""

from collections.abc import Iterable, Sequence
import json
import mmap
import pathlib
from typing import Self

import google_crc32c
import numpy as np

from ov_data import fs, keep_list, manifest
from ov_data.records import RecordError

FEATURE = "recaption"  # name of the captions among the features of a record
FORMAT = "ov_data recaptions 1"
MANIFEST = "recaptions.json"
_TEXTS, _OFFSETS = "recaptions.bin", "recaptions.offsets"
_CRC_BYTES = 4
_OFFSET = np.dtype("<u8")
_MAX_BYTES = 1 << 20  # of the manifest
_REMEDY = "repeat //tools/data:recaption, or copy the folder again"


class Recaptions:
  """The new captions of a source.

  Attributes:
    source: identity of the source, see `ov_data.keep_list.identity`.
    fingerprint: 16 hex digits that depend on the captions.
  """

  def __init__(self, folder: pathlib.Path, source: str, fingerprint: str, records: int):
    self.source, self.fingerprint = source, fingerprint
    self._folder = folder
    size, expected = (folder / _OFFSETS).stat().st_size, _OFFSET.itemsize * (records + 1)
    if size != expected:
      raise ValueError(f"{_OFFSETS} has {size:,} bytes, expected {expected:,}")
    self._offsets = np.memmap(folder / _OFFSETS, _OFFSET, "r")
    with open(folder / _TEXTS, "rb") as file:
      self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(self._texts) != int(self._offsets[-1]):
      raise ValueError(
        f"{_TEXTS} has {len(self._texts):,} bytes, expected {int(self._offsets[-1]):,}"
      )

  @classmethod
  def open(cls, folder: str) -> Self:
    """Open a folder.

    Raises:
      ValueError: if it has no complete captions, or a file is truncated or damaged.
    """
    path = pathlib.Path(folder)
    try:
      content = json.loads(fs.read_regular(str(path / MANIFEST), _MAX_BYTES))
      if content["format"] != FORMAT or content != manifest.add_checksum(content):
        raise ValueError("another format, or the checksum does not match")
      return cls(path, content["source"], content["fingerprint"], content["records"])
    except FileNotFoundError as error:
      raise ValueError(f"recaptions={folder}: a file is missing ({error}); {_REMEDY}") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
      raise ValueError(f"recaptions={folder} is not usable ({error}); {_REMEDY}") from None

  def __len__(self) -> int:
    """Return the number of records."""
    return len(self._offsets) - 1

  def __getitem__(self, record: int) -> list[bytes]:
    """Return the captions of a record in UTF-8; none if the record could not be captioned.

    Raises:
      RecordError: if the bytes of the record are damaged.
    """
    if not 0 <= record < len(self):
      raise IndexError(f"record={record}: expected 0 to {len(self) - 1}")
    first, stop = int(self._offsets[record]), int(self._offsets[record + 1])
    content = self._texts[first : max(first, stop - _CRC_BYTES)]
    checksum = self._texts[max(first, stop - _CRC_BYTES) : stop]
    if checksum != google_crc32c.value(content).to_bytes(_CRC_BYTES, "little"):
      raise RecordError(first, f"checksum of {_TEXTS}")
    return [text.encode() for text in json.loads(content)]

  def check_fits(self, records: keep_list.Located) -> None:
    """Raise ValueError if the captions were written for another source, split or slice."""
    if len(records) != len(self) or keep_list.identity(records) != self.source:
      raise ValueError(
        f"recaptions={self._folder} has captions of {len(self):,} records of the source "
        f"{self.source}, and this one has {len(records):,} and is {keep_list.identity(records)}; "
        "write captions of this source and split with //tools/data:recaption"
      )


def write(
  folder: pathlib.Path,
  source: str,
  fingerprint: str,
  records: int,
  captions: Iterable[Sequence[str] | None],
) -> None:
  """Write the files of a folder, unless they are there already.

  Args:
    folder: folder of the files.
    source: identity of the source.
    fingerprint: hex digits that depend on the captions.
    records: number of records.
    captions: captions of each record in order; None without captions.

  Raises:
    OSError: if a file cannot be written.
  """
  content = {
    "format": FORMAT, "source": source, "fingerprint": fingerprint, "records": records,
  }  # fmt: skip
  done = json.dumps(manifest.add_checksum(content)).encode()
  path = folder / MANIFEST
  if path.exists() and fs.read_regular(str(path), _MAX_BYTES) == done:
    return
  path.unlink(missing_ok=True)
  parts = {name: folder / f"{name}.part" for name in (_TEXTS, _OFFSETS)}
  with fs.writing(str(folder)):
    offsets = np.memmap(parts[_OFFSETS], _OFFSET, "w+", shape=(records + 1,))
    offset = record = 0
    offsets[0] = 0
    with open(parts[_TEXTS], "wb") as file:
      for record, texts in enumerate(captions, 1):
        line = json.dumps(list(texts or ())).encode()
        file.write(line + google_crc32c.value(line).to_bytes(_CRC_BYTES, "little"))
        offset += len(line) + _CRC_BYTES
        offsets[record] = offset
    offsets.flush()
    if record != records:
      raise ValueError(f"captions of {record:,} records, expected {records:,}")
    for name, part in parts.items():
      part.replace(folder / name)
  fs.write_atomic(str(path), done)
