"""Progress of an interrupted writer: the recipe and a checksummed log per shard.

    dataset.progress/recipe.json
    dataset.progress/train-00000-of-00002.tfrecord.json

A shard is reused if the checksum of its log is valid, the recipe is the same, and the shard still
has the checksum of the written bytes. Otherwise it is renamed and written again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import hashlib
import itertools
import json
import logging
import os
from pathlib import Path
import re
import shutil
from typing import Any

import google_crc32c

from ov_data import fs, index, manifest, shard_names, shards
from ov_data.request import Request, Source
from ov_data.splits import Split

FOLDER = "dataset.progress"
_RECIPE = "recipe.json"
_PART = re.compile(
  r"(.+\.(tfrecord|ovidx|json|jsonl)|classes\.txt)\.[0-9a-f]+\.part", re.S
)  # the last one belongs to the converter
_READERS = 4  # threads that verify shards
_CHUNK_BYTES = 4 << 20
_EXCERPT = 60  # maximum number of characters of a value in a message

log = logging.getLogger("ov_data")


def prepare_directory(path: Path, recipe: Mapping[str, Any], overwrite: bool) -> None:
  """Check that the content of the directory belongs to this recipe; clear it if `overwrite`.

  Raises:
    ValueError: if the directory contains data of another recipe or shards of unknown origin.
  """
  progress = path / FOLDER
  if find_complete(path, recipe):
    return
  for place in (path / manifest.MANIFEST, progress / _RECIPE):
    try:
      content = manifest.read_json(str(place))
    except FileNotFoundError:
      continue
    except ValueError as error:
      if overwrite:
        break
      raise ValueError(f"{error}; choose another directory, or replace it with overwrite") from None
    found = content.get("recipe") if isinstance(content, dict) else None
    if found == recipe and place.parent == progress:
      _remove_parts(path)
      return
    if not overwrite:
      if found == recipe:
        raise ValueError(
          f"{path} was complete, but now {_change(path, content)}. Copy the shards again, or "
          "replace the data set with overwrite."
        )
      raise ValueError(
        f"{path} contains another data set: {difference(found or {}, recipe)}. Choose another "
        "directory, or replace it with overwrite."
      )
    break
  else:
    if any(map(shard_names.is_shard, _names(path))) and not overwrite:
      raise ValueError(
        f"{path} contains record files but neither {manifest.MANIFEST} nor unfinished work of this "
        "writer. Choose another directory, or replace them with overwrite."
      )
  for name in (manifest.MANIFEST, manifest.SKIPPED):  # first, because they describe the other files
    (path / name).unlink(missing_ok=True)
  shutil.rmtree(progress, ignore_errors=True)
  for name in _names(path):
    if shard_names.is_shard(name.removesuffix(index.SUFFIX)):
      (path / name).unlink(missing_ok=True)
  _remove_parts(path)
  fs.make_folder(str(progress))
  content = json.dumps({"recipe": recipe}).encode()
  fs.write_atomic(str(progress / _RECIPE), content)


def find_complete(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
  """Return the manifest if the directory contains a complete data set of this recipe, else None."""
  try:
    content = manifest.read_json(str(path / manifest.MANIFEST))
  except (FileNotFoundError, ValueError):
    return None
  if not isinstance(content, dict) or content.get("recipe") != recipe or _change(path, content):
    return None
  return content


def _change(path: Path, content: Mapping[str, Any]) -> str:
  """Return how the shards differ from the manifest; "" if they match."""
  try:
    for name, split in content["splits"].items():
      if split["examples"]:
        found = shards.Shards(Request(Source(str(path)), Split(name)))
        if found.fingerprint != split["fingerprint"]:
          return f"the shards of split {name!r} are not the written ones"
        if changed := _changed_shards(found.indexes, split.get("checksums")):
          shown = ", ".join(fs.printable(fs.basename(shard)) for shard in changed[:4])
          return f"{len(changed)} of its shards are damaged: {shown}"
    Counter(content["skipped"])
  except (ValueError, OSError) as error:
    return f"its shards cannot be read: {error}"
  except (LookupError, TypeError, AttributeError) as error:
    return f"its {manifest.MANIFEST} is damaged ({type(error).__name__}: {error})"
  return ""


def _changed_shards(indexes: Sequence[index.ShardIndex], checksums: Any) -> list[str]:
  """Return the shards whose bytes do not match the checksums in the manifest, if it has any."""
  if checksums is None:
    return []
  if len(checksums) != len(indexes):
    raise ValueError(f"{len(checksums)} checksums of {len(indexes)} shards")
  with futures.ThreadPoolExecutor(_READERS, "ov-verify") as pool:
    found = pool.map(lambda shard: _checksum_of(fs.Reader(shard.path)), indexes)
    return [i.path for i, ours, theirs in zip(indexes, found, checksums) if ours != theirs]


def has_temporary_files(path: Path) -> bool:
  """Return whether a complete data set has temporary files of a killed writer."""
  return any(name == FOLDER or _PART.fullmatch(name) for name in _names(path))


def remove_temporary_files(path: Path) -> None:
  """Remove temporary files of a killed writer."""
  clear(path)
  _remove_parts(path)


def write_log(path: Path, name: str, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
  """Store the log of a finished shard.

  Args:
    path: path of the data set.
    name: name of the shard.
    recipe: recipe of the data set.
    facts: JSON-serializable data of the shard for the manifest; "checksum" is the crc32c of the
      written bytes.
  """
  size = fs.size(str(path / name))
  content = {"facts": facts, "recipe": _digest(recipe), "bytes": size}
  fs.write_atomic(str(_log_path(path, name)), json.dumps([_checksum(content), content]).encode())


def read_log(path: Path, name: str, recipe: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
  """Read the log of a shard and verify the shard.

  A modified shard is renamed with the suffix ".damaged".

  Returns:
    The facts, or None if the shard must be written; and the reason to write it again, "" if it was
    never finished.
  """
  try:
    entry = manifest.read_json(str(_log_path(path, name)))
  except FileNotFoundError:
    return None, ""
  except (ValueError, OSError) as error:
    return None, f"its log is damaged ({_reason(error)})"
  if not isinstance(entry, list) or len(entry) != 2 or entry[0] != _checksum(entry[1]):
    return None, "its log is damaged or has another version"
  try:
    content = entry[1]
    if content["recipe"] != _digest(recipe):
      return None, "its log belongs to another recipe"
    facts: dict[str, Any] = content["facts"]
    expected = content["bytes"], facts["checksum"]
    int(facts["examples"]), len(facts["skipped"]), facts["features"].items()
  except (LookupError, TypeError, ValueError, AttributeError):
    return None, "its log has another version"
  try:
    reader = fs.Reader(str(path / name))
    if reader.size() == expected[0] and _checksum_of(reader) == expected[1]:
      return facts, ""
    problem = "its bytes have changed"
  except FileNotFoundError:
    return None, "it is missing"
  except OSError as error:
    problem = f"it cannot be read ({_reason(error)})"
  kept = _set_aside(path, name)
  return None, f"{problem}; the damaged file is kept as {fs.printable(kept)}"


def read_logs(
  path: Path, names: Iterable[str], recipe: Mapping[str, Any], progress: Callable[[int], None]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """Read the logs of an interrupted writer and verify its finished shards.

  Args:
    path: path of the data set.
    names: names of all shards.
    recipe: recipe of the data set.
    progress: callback that receives the number of examples of each reusable shard.

  Returns:
    The facts of reusable shards by name; and the names of finished shards that must be written
    again. The reasons are logged.
  """
  found: dict[str, dict[str, Any]] = {}
  again: list[str] = []
  names = list(names)
  with futures.ThreadPoolExecutor(_READERS, "ov-verify") as pool:
    for name, (facts, problem) in zip(names, pool.map(lambda n: read_log(path, n, recipe), names)):
      if facts is not None:
        found[name] = facts
        progress(facts["examples"] + len(facts["skipped"]))
      elif problem:
        again.append(name)
        log.warning("%s is written again: %s", fs.printable(str(path / name)), problem)
  return found, again


def _checksum_of(reader: fs.Reader) -> int:
  checksum, offset = 0, 0
  while data := reader.read(offset, _CHUNK_BYTES):
    checksum = google_crc32c.extend(checksum, data)
    offset += len(data)
  return checksum


def _set_aside(path: Path, name: str) -> str:
  """Rename a damaged shard to an unused name; return that name."""
  for number in itertools.count(1):
    kept = f"{name}{f'.{number}' if number > 1 else ''}{shard_names.DAMAGED}"
    if not os.path.lexists(path / kept):
      with fs.writing(str(path / kept)):
        os.rename(path / name, path / kept)
      return kept
  raise AssertionError("there are too many damaged copies")


def _reason(error: Exception) -> str:
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return fs.printable(" ".join(text.split()))


def clear(path: Path) -> None:
  """Remove the logs of a complete data set."""
  shutil.rmtree(path / FOLDER, ignore_errors=True)


def difference(found: Any, wanted: Any, name: str = "") -> str:
  """Return the first difference of two recipes: the name and both values."""
  if isinstance(found, dict) and isinstance(wanted, dict):
    keys = [key for key in {**wanted, **found} if found.get(key, ...) != wanted.get(key, ...)]
    prefix = f"{name}." if name else ""
    return "; ".join(
      difference(found.get(k, ...), wanted.get(k, ...), f"{prefix}{k}") for k in keys
    )
  if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
    first = next(n for n, (a, b) in enumerate(zip(found, wanted)) if a != b)
    return difference(found[first], wanted[first], f"{name}[{first}]")
  name = fs.printable(name)[:_EXCERPT] or "recipe"
  return f"{name} was {_excerpt(found, wanted)}, now {_excerpt(wanted, found)}"


def _excerpt(value: Any, other: Any) -> str:
  """Return an excerpt of about 60 characters of a value, around the first difference."""
  if value is ...:
    return "not set"
  text, other = fs.printable(str(value)), fs.printable(str(other))
  same = next(
    (n for n, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other))
  )
  start = max(0, same - _EXCERPT // 2) if len(text) > _EXCERPT else 0
  stop = start + _EXCERPT
  return f"{'...' if start else ''}{text[start:stop]}{'...' if stop < len(text) else ''}"


def _names(path: Path) -> list[str]:
  return fs.listdir(str(path)) if path.is_dir() else []


def _remove_parts(path: Path) -> None:
  """Remove partial files of a killed writer."""
  for folder in (path, path / FOLDER):
    for name in _names(folder):
      if _PART.fullmatch(name):
        (folder / name).unlink(missing_ok=True)


def _log_path(path: Path, name: str) -> Path:
  return path / FOLDER / f"{name}.json"


def _digest(recipe: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _checksum(content: Any) -> int:
  return google_crc32c.value(json.dumps(content, sort_keys=True).encode())
