"""Members of an uncompressed tar and where their bytes are; resumes after damage.

A header is used only if its checksum is right. After a damaged one, the next one is searched that
has the magic and a right checksum, also where bytes were lost or inserted. (In an old archive
without magic, it is the next block with a right checksum.) Archives that follow each other in one
file are all read, as `tar --ignore-zeros` does.
"""

from collections.abc import Iterator
import dataclasses
import os
import stat
import tarfile
from typing import BinaryIO

COMPRESSED_TARS = (
  ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst",
)  # fmt: skip
DAMAGE = "broken tar file"
_BLOCK = 512
_CHUNK = 1 << 20
_MAX_EXTRA = 1 << 20  # bytes of a long name or of PAX headers
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
_NO_FILES = (b"V", b"D")  # the label of a volume and the names in a folder, of GNU tar
_KINDS = {
  tarfile.SYMTYPE: "symbolic link in the tar",
  tarfile.GNUTYPE_SPARSE: "sparse file in the tar",
  tarfile.CHRTYPE: "device in the tar",
  tarfile.BLKTYPE: "device in the tar",
  tarfile.FIFOTYPE: "pipe in the tar",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
  """A regular file in the tar, or a second name (hard link) of one.

  Attributes:
    name: invalid UTF-8 as surrogates.
    archive: 0; 1 for a second archive in the same file, and so on.
    header: byte offset of its header.
    offset, size: where its bytes are.
    checksum: of the header.
  """

  name: str
  archive: int
  header: int
  offset: int
  size: int
  checksum: int


@dataclasses.dataclass(frozen=True, slots=True)
class Passed:
  """Something in the tar that gives no member: a link, a device, damage (`name` is "")."""

  name: str
  reason: str
  detail: str


def read_members(path: str) -> Iterator[Member | Passed]:
  """Yield the members in order.

  Raises:
    ValueError: the file is no tar, compressed, or no regular file; says what to do.
    OSError: it cannot be read.
  """
  with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
      raise ValueError(f"{path}: not a regular file; give tar files.")
    yield from _Reader(path, file, status.st_size).members()


def compression(path: str) -> str | None:
  """Return how a regular file is compressed by its first bytes; None if it is not."""
  with open(path, "rb") as file:
    start = file.read(8)
  return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)


class _Reader:
  def __init__(self, path: str, file: BinaryIO, size: int):
    self._path, self._file, self._size = path, file, size
    self._blobs: dict[str, Member] = {}  # by name, the last one counts
    self._global: dict[str, str] = {}
    self._extra: dict[str, str] = {}  # of PAX headers and long names, for the next member
    self._archive = 0
    self._ended = False  # zeros were read since the last header
    self._has_magic = True
    self._search_from = 0

  def members(self) -> Iterator[Member | Passed]:
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
        self._extra = {}
        after = self._next_header(at)
        if not good and after >= self._size:
          self._refuse(error)
        damaged = after >= self._size
        yield Passed("", DAMAGE, f"damaged at byte {at:,} ({error}); read on at byte {after:,}"
                     if not damaged else f"damaged at byte {at:,} ({error})")  # fmt: skip
        at = after
        continue
      good += 1
      # Bytes that were lost or inserted in the data move the next header by a few bytes.
      self._search_from = max(at + _BLOCK, after - _BLOCK + 1)
      self._has_magic = block[_MAGIC_AT:].startswith(_MAGIC)
      if result is not None:
        yield result
      at = after
    if not good:
      self._refuse("empty")
    if not self._ended and not damaged:
      yield Passed("", DAMAGE, f"no end mark at byte {self._size:,}; probably cut off")

  def _member(
    self, header: tarfile.TarInfo, block: bytes, at: int
  ) -> tuple[Member | Passed | None, int]:
    """Return what a header stands for, and where the next one is; ValueError where it is wrong."""
    data = at + _BLOCK
    if header.size < 0:
      raise ValueError(f"size {header.size}")
    if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
      key = "path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
      text = self._extra_data(header, data).split(b"\0", 1)[0]
      self._extra[key] = text.decode("utf-8", "surrogateescape")
      return None, data + _padded(header.size)
    if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
      records = _pax_records(self._extra_data(header, data))
      (self._global if header.type == tarfile.XGLTYPE else self._extra).update(records)
      return None, data + _padded(header.size)
    extra, self._extra = {**self._global, **self._extra}, {}
    name = extra.get("path", _name(header, block))
    size = int(extra["size"]) if "size" in extra else header.size
    if header.type == tarfile.DIRTYPE:
      return None, data
    if header.type in _NO_FILES:
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
      raise ValueError(f"{printable_name(name)} has {size:,} bytes, which lead past the end")
    if "GNU.sparse.major" in extra or "GNU.sparse.map" in extra or "GNU.sparse.size" in extra:
      name = extra.get("GNU.sparse.name", name)
      return Passed(name, _KINDS[tarfile.GNUTYPE_SPARSE], f"at byte {at:,}"), after
    if header.type == tarfile.LNKTYPE:
      target = self._blobs.get(link := extra.get("linkpath", header.linkname))
      if target is None:
        return Passed(name, "link to a missing member", f"-> {link}, at byte {at:,}"), after
      member = dataclasses.replace(target, name=name, header=at, archive=self._archive)
    elif header.type in _REGULAR:
      member = Member(name, self._archive, at, data, size, header.chksum)
    else:
      reason = _KINDS.get(header.type, "member of an unknown type")
      detail = f"-> {extra.get('linkpath', header.linkname)}, " if header.issym() else ""
      return Passed(name, reason, f"{detail}at byte {at:,}"), after
    self._blobs[name] = member
    return member, after

  def _extra_data(self, header: tarfile.TarInfo, at: int) -> bytes:
    if header.size > _MAX_EXTRA or at + header.size > self._size:
      raise ValueError(f"a name or PAX header of {header.size:,} bytes")
    return self._read(at, header.size)

  def _refuse(self, error: object) -> None:
    if (kind := compression(self._path)) is not None:
      raise ValueError(
        f"{self._path}: compressed with {kind}; decompress it and give the .tar file."
      )
    raise ValueError(
      f"{self._path}: no tar file that can be read ({error}, {self._size:,} bytes); get it again "
      "or leave it out."
    ) from None

  def _read(self, at: int, length: int) -> bytes:
    self._file.seek(at)
    return self._file.read(length)

  def _skip_zeros(self, at: int) -> int:
    """Return the offset of the next block that is not all zeros, or the end."""
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
  """Yield where blocks begin that have the magic."""
  found = chunk.find(_MAGIC, _MAGIC_AT)
  while found >= 0:
    yield found - _MAGIC_AT
    found = chunk.find(_MAGIC, found + 1)


def printable_name(name: str) -> str:
  """Return a member's name for a message."""
  return name.encode("utf-8", "backslashreplace").decode()[:100]


def _name(header: tarfile.TarInfo, block: bytes) -> str:
  """Return the name in a header. GNU tar has times where others have a prefix of the name."""
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
  """Return the bytes of all blocks that hold so many."""
  return -(-size // _BLOCK) * _BLOCK


def _pax_records(data: bytes) -> dict[str, str]:
  """Return the records "length key=value\\n"; ValueError where they are malformed."""
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
