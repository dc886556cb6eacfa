"""Record source over tars in the layout of webdataset.

    000001.jpg  000001.txt  000001.json  000002.jpg  000002.txt ...

Consecutive members whose names are equal up to the first dot are one record. Its features are the
members by extension, for example `image_key="jpg"` and `caption_keys=("txt", "json/caption")`.
"""

from collections.abc import Collection
import json
import re
import tarfile
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ov_data import fs
from ov_data.example import FeatureError
from ov_data.index import Damage, Scan, ShardKind
from ov_data.layouts import tar_members
from ov_data.layouts.tar_members import Member
from ov_data.layouts.tree import IMAGE_SUFFIXES, is_hidden
from ov_data.record_source import Record
from ov_data.records import MAX_RECORD_BYTES, RecordError
from ov_data.request import Request
from ov_data.shard_files import Raw, ShardFiles, ShardRuns
from ov_data.shard_names import is_shard

_BLOCK = 512
_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)  # in order of preference
_MAX_JSON_BYTES = 1 << 20
_LABEL = re.compile(rb"\s*-?\d{1,18}\s*")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAMES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_NO_DATA = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE)
_GNU_MAGIC = b"ustar  \0"


def open_tars(request: Request) -> ShardFiles | None:
  """Open tars; return None if no file at the path has their name.

  Raises:
    ValueError, OSError: see `ShardFiles`.
  """
  return Tars(request) if any(is_shard(name, TAR) for name in request.names) else None


def scan_tar(path: str, size: int) -> Scan:
  """Find the samples of a tar. Only headers are read, in steps of a few KB from local files."""
  samples: list[tuple[int, int, int]] = []
  damage: list[Damage] = []
  seen: set[tuple[int, str]] = set()
  run: list[Member] = []

  def finish() -> None:
    if not run:
      return
    start, stop, key = run[0].start, run[-1].stop, _key(run[0])
    if stop - start > MAX_RECORD_BYTES:
      damage.append(Damage(start, stop - start, "sample over 1 GiB", 1))
    elif key in seen:
      damage.append(Damage(start, stop - start, "members of a sample are apart", 1))
    else:
      samples.append((start, stop - start, _checksum([member.crc for member in run])))
    seen.add(key)
    run.clear()

  with fs.open_random(path, size) as file:
    try:
      for member in tar_members.members_of(path, file, size):
        if not isinstance(member, Member):
          if not member.name:
            damage.append(Damage(member.offset, member.length, member.reason, None))
        elif _split(member.name) is not None:
          if run and _key(run[0]) != _key(member):
            finish()
          run.append(member)
    except tar_members.EmptyTar:
      return Scan.of((), (), has_checksums=True)
    except ValueError:
      file.seek(0)
      compression = tar_members.compression_of(file.read(8))
      reason = f"{compression}-compressed shard" if compression else "not a readable tar file"
      return Scan.of((), [Damage(0, size, reason, None)], has_checksums=True)
  finish()
  return Scan.of(samples, damage, has_checksums=True)


TAR = ShardKind("tar", ".tar", re.compile(r".*\.tar", re.S | re.I), scan_tar, has_checksums=True)


class Tars(ShardRuns):
  """The samples of uncompressed tars.

  Features of a sample: each member under its extension in lower case, the entries of its `.json`
  under `json/<name>`, the integer in its `.cls` under "label", and its name under "key". If
  `image_key` is the extension of an image and the sample has no such member, its image with
  another extension is used (.jpg, .jpeg, .png, .webp, ...).
  """

  kind = TAR

  def _parse(self, raw: Raw, keys: Collection[str] | None) -> Record:
    name, members = _members(raw)
    image_key = self._image_key
    if image_key not in members and image_key in _IMAGES:
      other = next((suffix for suffix in _IMAGES if suffix in members), None)
      if other is not None:
        members[image_key] = members.pop(other)
    texts = {
      suffix: [raw.data[start:stop]]
      for suffix, (start, stop) in members.items()
      if keys is None or suffix in keys
    }
    labels: dict[str, NDArray[np.int64]] = {}
    extra: dict[str, NDArray[np.float32]] = {}
    if "json" in members and (keys is None or any(key.startswith("json/") for key in keys)):
      start, stop = members["json"]
      for key, value in _json_features(raw.data[start:stop]).items():
        if keys is not None and key not in keys:
          continue
        if isinstance(value, list):
          texts[key] = value
        else:
          (labels if value.dtype.kind == "i" else extra)[key] = value
    if "cls" in members and (keys is None or "label" in keys):
      start, stop = members["cls"]
      if _LABEL.fullmatch(raw.data, start, stop):
        labels["label"] = np.array([int(raw.data[start:stop])], np.int64)
    if keys is None or "key" in keys:
      texts["key"] = [name.encode("utf-8", "surrogateescape")]
    images = texts.get(image_key)
    return Record(images[0] if images else None, texts, labels, extra)


def _members(raw: Raw) -> tuple[str, dict[str, tuple[int, int]]]:
  """Return the name of a sample, and the range of each member in its bytes by extension.

  Raises:
    RecordError: if the headers differ from the indexed ones.
  """
  data, at = raw.data, 0
  found: dict[str, tuple[int, int]] = {}
  checksums: list[int] = []
  sample = ""
  extra: dict[str, str] = {}
  try:
    while at < len(data):
      block = data[at : at + _BLOCK]
      kind, size = block[156:157], tarfile.nti(block[124:136])  # type: ignore[attr-defined]
      start = at + _BLOCK
      if kind in _NAMES:
        extra |= _extra(kind, data[start : start + size])
        at = start + _padded(size)
        continue
      size = int(extra.get("size", size))
      name = extra.get("path") or _name(block)
      extra = {}
      at = start if kind in _NO_DATA else start + _padded(size)
      parts = _split(name) if kind in (*_FILES, tarfile.LNKTYPE) else None
      if parts is not None:
        checksums.append(google_crc32c.value(block))
        sample = parts[0]
        if kind in _FILES:
          found[parts[1]] = (start, start + size)
  except (ValueError, tarfile.HeaderError):
    raise RecordError(raw.offset, "tar header") from None
  if at != len(data) or _checksum(checksums) != raw.checksum:
    raise RecordError(raw.offset, "tar headers differ from the index")
  return sample, found


def _extra(kind: bytes, data: bytes) -> dict[str, str]:
  """Return the name and size in an extra block of a member."""
  if kind == tarfile.GNUTYPE_LONGNAME:
    return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
  if b" path=" not in data and b" size=" not in data:  # usually only times
    return {}
  records = tar_members.pax_records(data)
  return {key: records[key] for key in ("path", "size") if key in records}


def _name(block: bytes) -> str:
  name = block[:100].split(b"\0", 1)[0]
  if block[257:262] == b"ustar" and not block.startswith(_GNU_MAGIC, 257):
    prefix = block[345:500].split(b"\0", 1)[0]
    name = prefix + b"/" + name if prefix else name
  return name.decode("utf-8", "surrogateescape")


def _key(member: Member) -> tuple[int, str]:
  parts = _split(member.name)
  return member.archive, parts[0] if parts else ""


def _split(name: str) -> tuple[str, str] | None:
  """Return the sample and the extension of a member; None if it is hidden or has no extension."""
  folder, slash, base = name.rpartition("/")
  stem, dot, suffix = base.partition(".")
  if not dot or not stem or is_hidden(base) or "__MACOSX" in folder.split("/"):
    return None
  return folder + slash + stem, suffix.lower()


def _checksum(checksums: list[int]) -> int:
  return google_crc32c.value(np.array(checksums, "<u4").tobytes())


def _padded(size: int) -> int:
  return -(-size // _BLOCK) * _BLOCK


def _json_features(data: bytes) -> dict[str, Any]:
  """Return the entries of a JSON object as features: lists of bytes, or arrays of numbers.

  Raises:
    FeatureError: if the data are not a JSON object.
  """
  try:
    content = json.loads(data) if len(data) <= _MAX_JSON_BYTES else None
  except (ValueError, RecursionError):
    content = None
  if not isinstance(content, dict):
    raise FeatureError("json is not an object of at most 1 MiB")
  features: dict[str, Any] = {}
  for key, value in content.items():
    values = value if isinstance(value, list) else [value]
    if all(isinstance(item, str) for item in values):
      features[f"json/{key}"] = [item.encode("utf-8", "surrogatepass") for item in values]
    elif all(isinstance(item, int) and -(2**63) <= item < 2**63 for item in values):
      features[f"json/{key}"] = np.array(values, np.int64)
    elif all(isinstance(item, int | float) for item in values):
      features[f"json/{key}"] = np.array(values, np.float32)
  return features
