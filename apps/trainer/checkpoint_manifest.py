"""The manifest of a checkpoint: size and checksum of every file, verified before it is read.

  write(unfinished_checkpoint)      # by process 0, before the directory gets its final name
  fault(checkpoint)                 # None, or what is damaged

`manifest.json` lists the files of `state/` and `metadata/` with the CRC-32 of their content. CRC-32
detects every flipped bit and every burst of up to 32 bits; zlib computes it faster than a disk
reads, and without the interpreter's lock. The manifest ends with a digest of itself. Manifests of
earlier versions hold sizes only and are still accepted.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
from typing import Annotated
import zlib

from absl import logging
from etils import epath
import msgspec

MANIFEST = "manifest.json"
ITEMS = ("state", "metadata")
# Without these orbax restores nothing, or only some of the arrays.
REQUIRED = ("state/manifest.ocdbt", "state/_METADATA", "metadata/metadata")

_Size = Annotated[int, msgspec.Meta(ge=0)]
_CHUNK = 1 << 20  # bytes; a thread's buffer
_THREADS = 16  # stat and read are a request each on gs://


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
  """Content of `manifest.json`; `files` maps a relative path to its size and CRC-32."""

  format: int
  files: dict[str, tuple[_Size, str]]
  sha256: str


def write(checkpoint: epath.Path) -> None:
  """Write the manifest of a checkpoint whose files are complete.

  Raises:
    OSError: a file cannot be read, or the manifest cannot be written.
  """
  names = _names(checkpoint)
  (checkpoint / MANIFEST).write_text(_text(dict(zip(names, _checksums(checkpoint, names)))))


def fault(checkpoint: epath.Path) -> str | None:
  """Describe the first difference between a checkpoint and its manifest.

  A file that was verified once is read again only after its size or its times have changed.

  Args:
    checkpoint: a directory with a final name.

  Returns:
    What is missing or differs; None for an intact checkpoint.
  """
  path = checkpoint / MANIFEST
  try:
    text = path.read_text()
  except FileNotFoundError:
    return f"{MANIFEST} is missing"
  except (OSError, UnicodeDecodeError) as error:
    return f"{MANIFEST} cannot be read: {error}"
  expected = _parse(text)
  if isinstance(expected, str):
    return expected
  try:
    stamps = _stamps(checkpoint, _names(checkpoint))
    for name, (size, _) in expected.items():
      if name not in stamps:
        return f"{name} is missing"
      if stamps[name][0] != size:
        return f"{name} has {stamps[name][0]} bytes instead of {size}"
    known = {name: stamps[name] for name, (_, crc) in expected.items() if crc}
    return _wrong_content(str(checkpoint), text, tuple(known.items()))
  except OSError as error:
    return f"a file cannot be read: {error}"


def _parse(text: str) -> dict[str, tuple[int, str]] | str:
  """Size and CRC-32 of each file ("" where a manifest holds none), or what is wrong."""
  damaged = f"{MANIFEST} is damaged"
  try:
    files = msgspec.json.decode(text, type=_Manifest).files
    if _text(files) != text:  # a changed byte that is still valid JSON
      return damaged
  except msgspec.MsgspecError:
    try:
      sizes = msgspec.json.decode(text, type=dict[str, _Size])
    except msgspec.MsgspecError:
      return damaged
    files = {name: (size, "") for name, size in sizes.items()}
  missing = [name for name in REQUIRED if name not in files]
  return f"{MANIFEST} lists no {missing[0]}" if missing else files


def _text(files: dict[str, tuple[int, str]]) -> str:
  """The manifest as text; ends with the digest of the files that it lists."""
  listed = ",\n".join(f"{json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
  digest = hashlib.sha256(listed.encode()).hexdigest()
  return f'{{"format": 2, "files": {{\n{listed}\n}}, "sha256": "{digest}"}}\n'


@functools.lru_cache(maxsize=256)
def _wrong_content(
  checkpoint: str, text: str, stamps: tuple[tuple[str, tuple[int, ...]], ...]
) -> str | None:
  """Compare the content of files with a manifest; `stamps` tell the cache of a change."""
  expected = _parse(text)
  assert isinstance(expected, dict)
  if not stamps:
    logging.warning(
      "%s was saved by an earlier version, without checksums; only sizes are verified", checkpoint
    )
  names = [name for name, _ in stamps]
  for name, (_, found) in zip(names, _checksums(epath.Path(checkpoint), names)):
    if found != expected[name][1]:
      return f"{name} has the checksum {found} instead of {expected[name][1]}"
  return None


def _names(checkpoint: epath.Path) -> list[str]:
  """Relative paths of all files below the two items."""
  return [
    str((folder / name).relative_to(checkpoint))
    for item in ITEMS
    for folder, _, names in (checkpoint / item).walk()
    for name in names
  ]


def _stamps(checkpoint: epath.Path, names: list[str]) -> dict[str, tuple[int, ...]]:
  """Size and times of files."""
  remote = "://" in str(checkpoint)

  def stamp(name: str) -> tuple[int, ...]:
    path = checkpoint / name
    if remote:
      found = path.stat()
      return found.length, int(found.mtime)
    local = os.stat(path)
    return local.st_size, local.st_mtime_ns, local.st_ctime_ns, local.st_ino

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(stamp, names), strict=True))


def _checksums(checkpoint: epath.Path, names: list[str]) -> list[tuple[int, str]]:
  """Size and CRC-32, as 8 hex digits, of the content of files."""

  def read(name: str) -> tuple[int, str]:
    size, crc = 0, 0
    with (checkpoint / name).open("rb") as file:
      while chunk := file.read(_CHUNK):
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
    return size, f"{crc:08x}"

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(read, names))
