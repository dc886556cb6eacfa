"""Checkpoint manifests: size and checksum of every file, verified before a checkpoint is read.

  write(unfinished_checkpoint)      # by process 0, before the directory gets its final name
  find_damage(checkpoint)           # None, or what is damaged

`manifest.json` lists the files of `state/` and `metadata/` with the CRC-32 of their content. CRC-32
detects every flipped bit and every burst error of up to 32 bits. zlib computes it faster than a
disk reads, and without holding the GIL. The manifest ends with a digest of its own content.
Manifests of earlier versions contain sizes only and are still accepted.
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
# Without these files Orbax restores nothing, or only some of the arrays.
REQUIRED = ("state/manifest.ocdbt", "state/_METADATA", "metadata/metadata")

_Size = Annotated[int, msgspec.Meta(ge=0)]
_CHUNK = 1 << 20  # bytes; read buffer of a thread
_THREADS = 16  # on gs:// each stat and each read is a request


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


def find_damage(checkpoint: epath.Path) -> str | None:
  """Return the first difference between a checkpoint and its manifest.

  A verified file is read again only if its size or its times have changed.

  Args:
    checkpoint: directory with its final name.

  Returns:
    Description of the missing or different file; None for an intact checkpoint.
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
  """Return the size and CRC-32 of each file ("" if the manifest has none), or an error."""
  damaged = f"{MANIFEST} is damaged"
  try:
    files = msgspec.json.decode(text, type=_Manifest).files
    if _text(files) != text:  # valid JSON with a changed byte
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
  """Return the text of the manifest, which ends with the digest of its file list."""
  listed = ",\n".join(f"{json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
  digest = hashlib.sha256(listed.encode()).hexdigest()
  return f'{{"format": 2, "files": {{\n{listed}\n}}, "sha256": "{digest}"}}\n'


@functools.lru_cache(maxsize=256)
def _wrong_content(
  checkpoint: str, text: str, stamps: tuple[tuple[str, tuple[int, ...]], ...]
) -> str | None:
  """Compare the content of files with a manifest; `stamps` is part of the cache key."""
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
  """Return the relative paths of all files of the two items."""
  return [
    str((folder / name).relative_to(checkpoint))
    for item in ITEMS
    for folder, _, names in (checkpoint / item).walk()
    for name in names
  ]


def _stamps(checkpoint: epath.Path, names: list[str]) -> dict[str, tuple[int, ...]]:
  """Return the size and times of each file."""
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
  """Return the size and CRC-32, as 8 hex digits, of the content of each file."""

  def read(name: str) -> tuple[int, str]:
    size, crc = 0, 0
    with (checkpoint / name).open("rb") as file:
      while chunk := file.read(_CHUNK):
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
    return size, f"{crc:08x}"

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(read, names))
