"""Damage-tolerant reader of the members of uncompressed tars.

Only headers with a valid checksum are used. After a damaged header, reading resumes at the next
header with magic and valid checksum, even if bytes were lost or inserted. (In archives without
magic, it resumes at the next block with a valid checksum.) Concatenated archives are all read, as
by `tar --ignore-zeros`.
"""

from collections.abc import Iterator
import dataclasses
import os
import stat
import tarfile
from typing import BinaryIO

import google_crc32c

COMPRESSED_TARS = (
  ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst",
)  # fmt: skip
DAMAGE = "broken tar file"
_BLOCK = 512
_CHUNK = 1 << 20
_MAX_EXTRA = 1 << 20  # maximum bytes of a long name or of PAX headers
_MAGIC, _MAGIC_AT = b"ustar", 257
_GNU_MAGIC = b"ustar  \0"
_COMPRESSED = {
  b"\x1f\x8b": "gzip",
  b"BZh": "bzip2",
  b"\xfd7zXZ\0": "xz",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"PK\x03\x04": "zip",
}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_IGNORED_TYPES = (b"V", b"D")  # volume labels and directory listings of GNU tar
_KINDS = {
  tarfile.SYMTYPE: "symbolic link in the tar",
  tarfile.GNUTYPE_SPARSE: "sparse file in the tar",
  tarfile.CHRTYPE: "device in the tar",
  tarfile.BLKTYPE: "device in the tar",
  tarfile.FIFOTYPE: "pipe in the tar",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
  """A regular file in the tar, or a hard link to one.

  Attributes:
    name: name, with surrogates for invalid UTF-8.
    archive: index of the archive in the file, for concatenated archives.
    header: byte offset of the header.
    offset, size: byte range of the content.
    checksum: checksum of the header.
    start: byte offset of the first block, which may be a PAX header or a long name.
    stop: byte offset of the next header.
    crc: crc32c of the block of the header.
  """

  name: str
  archive: int
  header: int
  offset: int
  size: int
  checksum: int
  start: int
  stop: int
  crc: int


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedMember:
  """An entry without usable content: a link, a device, or damage (`name` is "").

  Attributes:
    name: name of the member; "" for damage.
    reason: short phrase for counting.
    detail: additional information.
    offset, length: damaged byte range.
  """

  name: str
  reason: str
  detail: str
  offset: int = 0
  length: int = 0


class EmptyTar(ValueError):
  """A file that contains only zeros, the end marker of a tar."""


def read_members(path: str) -> Iterator[Member | SkippedMember]:
  """Yield the members in order.

  Raises:
    ValueError: if the file is not a tar, is compressed, or is not a regular file.
    OSError: if the file cannot be read.
  """
  with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
      raise ValueError(f"{path}: not a regular file; pass tar files.")
    yield from members_of(path, file, status.st_size)


def members_of(path: str, file: BinaryIO, size: int) -> Iterator[Member | SkippedMember]:
  """Yield the members of an open tar in order.

  Args:
    path: path of the tar, for messages.
    file: seekable stream of the tar.
    size: size of the tar in bytes.

  Raises:
    EmptyTar: if the file contains only zeros.
    ValueError: if the file is not a tar, or is compressed.
    OSError: if the file cannot be read.
  """
  yield from _Reader(path, file, size).members()


def compression(path: str) -> str | None:
  """Return the compression of a regular file from its signature; None if uncompressed."""
  with open(path, "rb") as file:
    return compression_of(file.read(8))


def compression_of(start: bytes) -> str | None:
  """Return the compression of a file from its first 8 bytes; None if uncompressed."""
  return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)


class _Reader:
  def __init__(self, path: str, file: BinaryIO, size: int):
    self._path, self._file, self._size = path, file, size
    self._blobs: dict[str, Member] = {}  # by name; later members replace earlier ones
    self._global: dict[str, str] = {}
    self._extra: dict[str, str] = {}  # PAX headers and long names of the next member
    self._first = -1  # offset of the first block of the next member, if it has such extra blocks
    self._archive = 0
    self._ended = False  # whether zero blocks follow the last header
    self._has_magic = True
    self._search_from = 0

  def members(self) -> Iterator[Member | SkippedMember]:
    at, good, damaged = 0, 0, False
    while at < self._size:
      block = self._read(at, _BLOCK)
      if not block.strip(b"\0"):
        self._ended = self._ended or (good > 0 and len(block) == _BLOCK)
        at = self._skip_zeros(at)
        continue
      try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if self._ended:
          self._archive, self._ended = self._archive + 1, False
          self._global, self._extra = {}, {}
        result, after = self._member(header, block, at)
      except (tarfile.HeaderError, ValueError) as error:
        self._extra, self._first = {}, -1
        after = self._next_header(at)
        if not good and after >= self._size:
          self._refuse(error)
        damaged = after >= self._size
        detail = f"damaged at byte {at:,} ({error})"
        detail = detail if damaged else f"{detail}; reading resumes at byte {after:,}"
        yield SkippedMember("", DAMAGE, detail, at, after - at)
        at = after
        continue
      good += 1
      # Lost or inserted data bytes shift the next header.
      self._search_from = max(at + _BLOCK, after - _BLOCK + 1)
      self._has_magic = block[_MAGIC_AT:].startswith(_MAGIC)
      if result is not None:
        yield result
      at = after
    if not good and not self._size:
      self._refuse("empty")
    if not good:
      raise EmptyTar(f"{self._path}: not a readable tar file (empty, {self._size:,} bytes).")
    if not self._ended and not damaged:
      detail = f"no end marker at byte {self._size:,}; probably truncated"
      yield SkippedMember("", DAMAGE, detail, self._size)

  def _member(
    self, header: tarfile.TarInfo, block: bytes, at: int
  ) -> tuple[Member | SkippedMember | None, int]:
    """Return the entry of a header and the offset of the next one; ValueError if invalid."""
    data = at + _BLOCK
    first = at if self._first < 0 else self._first
    if header.size < 0:
      raise ValueError(f"size {header.size}")
    if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
      key = "path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
      self._first = first
      text = self._extra_data(header, data).split(b"\0", 1)[0]
      self._extra[key] = text.decode("utf-8", "surrogateescape")
      return None, data + _padded(header.size)
    if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
      records = pax_records(self._extra_data(header, data))
      if header.type == tarfile.XGLTYPE:
        self._global.update(records)
      else:
        self._extra.update(records)
        self._first = first
      return None, data + _padded(header.size)
    extra, self._extra, self._first = {**self._global, **self._extra}, {}, -1
    name = extra.get("path", _name(header, block))
    size = int(extra["size"]) if "size" in extra else header.size
    if header.type == tarfile.DIRTYPE:
      return None, data
    if header.type in _IGNORED_TYPES:
      return None, data + _padded(size)
    if header.type == tarfile.GNUTYPE_SPARSE:
      continued = block[482]
      while continued and data + _BLOCK <= self._size:
        continued, data = self._read(data, _BLOCK)[504], data + _BLOCK
    has_data = header.type in _REGULAR or header.type == tarfile.GNUTYPE_SPARSE or (
      header.type not in tarfile.SUPPORTED_TYPES
    )  # fmt: skip
    after = data + _padded(size) if has_data else data
    if size < 0 or (has_data and data + size > self._size):
      raise ValueError(f"{printable_name(name)} has {size:,} bytes, which exceeds the file")
    if "GNU.sparse.major" in extra or "GNU.sparse.map" in extra or "GNU.sparse.size" in extra:
      name = extra.get("GNU.sparse.name", name)
      return SkippedMember(name, _KINDS[tarfile.GNUTYPE_SPARSE], f"at byte {at:,}"), after
    if header.type == tarfile.LNKTYPE:
      target = self._blobs.get(link := extra.get("linkpath", header.linkname))
      if target is None:
        return SkippedMember(name, "link to a missing member", f"-> {link}, at byte {at:,}"), after
      member = dataclasses.replace(
        target, name=name, header=at, archive=self._archive, start=first, stop=after,
        crc=google_crc32c.value(block),
      )  # fmt: skip
    elif header.type in _REGULAR:
      crc = google_crc32c.value(block)
      member = Member(name, self._archive, at, data, size, header.chksum, first, after, crc)
    else:
      reason = _KINDS.get(header.type, "member of an unknown type")
      detail = f"-> {extra.get('linkpath', header.linkname)}, " if header.issym() else ""
      return SkippedMember(name, reason, f"{detail}at byte {at:,}"), after
    self._blobs[name] = member
    return member, after

  def _extra_data(self, header: tarfile.TarInfo, at: int) -> bytes:
    if header.size > _MAX_EXTRA or at + header.size > self._size:
      raise ValueError(f"a name or PAX header of {header.size:,} bytes")
    return self._read(at, header.size)

  def _refuse(self, error: object) -> None:
    if (kind := compression_of(self._read(0, 8))) is not None:
      raise ValueError(
        f"{self._path}: compressed with {kind}; decompress it and pass the .tar file."
      )
    raise ValueError(
      f"{self._path}: not a readable tar file ({error}, {self._size:,} bytes); download it "
      "again or exclude it."
    ) from None

  def _read(self, at: int, length: int) -> bytes:
    self._file.seek(at)
    return self._file.read(length)

  def _skip_zeros(self, at: int) -> int:
    """Return the offset of the next nonzero block, or the end."""
    while at < self._size:
      chunk = self._read(at, _CHUNK)
      rest = len(chunk.lstrip(b"\0"))
      if rest or not chunk:
        return at + (len(chunk) - rest) // _BLOCK * _BLOCK
      at += len(chunk)
    return self._size

  def _next_header(self, damaged: int) -> int:
    """Return the offset of the next header after a damaged one, or the end."""
    at = self._search_from if self._has_magic else damaged + _BLOCK
    while at < self._size:
      chunk = self._read(at, _CHUNK + _BLOCK - 1)
      starts = _before_magic(chunk) if self._has_magic else range(0, _CHUNK, _BLOCK)
      for start in starts:
        if at + start != damaged and _is_header(chunk[start : start + _BLOCK]):
          self._search_from = at + start + 1
          return at + start
      at += _CHUNK
    return self._size


def _before_magic(chunk: bytes) -> Iterator[int]:
  """Yield the offsets of blocks that contain the magic."""
  found = chunk.find(_MAGIC, _MAGIC_AT)
  while found >= 0:
    yield found - _MAGIC_AT
    found = chunk.find(_MAGIC, found + 1)


def printable_name(name: str) -> str:
  """Return the name of a member for a message."""
  return name.encode("utf-8", "backslashreplace").decode()[:100]


def _name(header: tarfile.TarInfo, block: bytes) -> str:
  """Return the name in a header. GNU tar stores times in place of the name prefix."""
  if block[_MAGIC_AT:].startswith(_GNU_MAGIC):
    return block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
  return header.name


def _is_header(block: bytes) -> bool:
  if not block[148:156].strip(b" \0").isdigit():  # the checksum
    return False
  try:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
  except (tarfile.HeaderError, ValueError):
    return False


def _padded(size: int) -> int:
  """Return the size rounded up to complete blocks."""
  return -(-size // _BLOCK) * _BLOCK


def pax_records(data: bytes) -> dict[str, str]:
  """Parse records "length key=value\\n"; raise ValueError if they are malformed."""
  records: dict[str, str] = {}
  at = 0
  while at < len(data) and data[at]:
    length, blank, _ = data[at : at + 20].partition(b" ")
    if not blank or not length.isdigit() or not 5 <= int(length) <= len(data) - at:
      raise ValueError("a PAX header that is malformed")
    key, equals, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
    if not equals:
      raise ValueError("a PAX header that is malformed")
    records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    at += int(length)
  return records
