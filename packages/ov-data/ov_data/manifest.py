"""Comparison of shards with the record counts of their manifest.

A folder of shards may contain `dataset.json` (from `ov_data.writer`) or `dataset_info.json` (from
TensorFlow Datasets). Only these counts reveal shards that are empty or truncated between two
records.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from typing import Any

import google_crc32c

from ov_data import fs
from ov_data.index import ShardIndex, paths_of
from ov_data.shard_names import NUMBERED

FORMAT = "ov_data dataset 1"
MANIFEST = "dataset.json"
SKIPPED = "skipped.jsonl"
TFDS_INFO = "dataset_info.json"  # in every directory of TensorFlow Datasets

_OWN_KEYS = frozenset(("format", "recipe", "features", "splits", "skipped"))
_MOST_BYTES = 256 << 20
_SHOWN = 4  # maximum number of shards in a message


@dataclasses.dataclass(frozen=True)
class ShardSet:
  """The shards NAME-00000-of-00004, NAME-00001-of-00004, ... of one split.

  Attributes:
    manifest: path of the manifest.
    split: name of the split.
    total: total number of records.
    records: number of records of each shard; None if the manifest has only the total.
    sizes: size of each shard in bytes, if known.
    fingerprint: fingerprint of all shards, see `fingerprint`; "" if unknown.
  """

  manifest: str
  split: str
  total: int
  records: tuple[int, ...] | None
  sizes: tuple[int, ...] | None
  fingerprint: str = ""


# (stem, number of shards, suffix) of file names -> shards in the manifest
_Sets = dict[tuple[str, int, str], ShardSet]


def read_json(path: str) -> Any:
  """Return the content of a JSON file.

  Raises:
    FileNotFoundError: if there is no regular file of that name.
    ValueError: if the file is not valid JSON.
    OSError: if the file cannot be read.
  """
  try:
    return json.loads(fs.read_regular(path, _MOST_BYTES))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def add_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
  """Return the content of a manifest with its checksum."""
  content = {key: value for key, value in content.items() if key != "checksum"}
  canonical = json.dumps(content, sort_keys=True).encode()
  return {**content, "checksum": google_crc32c.value(canonical)}


def fingerprint(indexes: Sequence[ShardIndex]) -> str:
  """Return 16 hex digits of shard names, sizes, edge checksums and record counts, not of the path.

  Args:
    indexes: indexes of the shards in order.
  """
  shards = [(fs.basename(i.path), i.size, i.fingerprint, len(i)) for i in indexes]
  return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def is_tfds(folder: str) -> bool:
  """Return whether a folder was written by TensorFlow Datasets."""
  return _tfds_info(folder) is not None


def check_counts(indexes: Sequence[ShardIndex]) -> dict[str, int]:
  """Compare the records of shards with the manifests in their folders.

  Records that the index marks as damaged count as present.

  Args:
    indexes: indexes of shards from any folders; shards without a manifest are ignored.

  Returns:
    The number of damaged records by path, for damaged shards in a manifest.

  Raises:
    ValueError: if records are missing, there are more than in the manifest, or a shard was
      replaced; the message names the shards if the manifest identifies them.
  """
  known = {
    folder: {**_tfds_sets(folder), **_dataset_sets(folder)}
    for folder in dict.fromkeys(map(_folder, paths_of(indexes)))
  }
  if not any(known.values()):
    return {}
  folders: dict[str, list[ShardIndex]] = {}
  for index in {index.path: index for index in indexes}.values():
    folders.setdefault(_folder(index.path), []).append(index)
  lost: dict[str, int] = {}
  for folder, in_folder in folders.items():
    sets = known[folder]
    opened: dict[tuple[str, int, str], dict[int, ShardIndex]] = {}
    for index in in_folder if sets else ():
      if match := NUMBERED.fullmatch(fs.basename(index.path)):
        key = (match["stem"], int(match["count"]), match["rest"])
        opened.setdefault(key, {})[int(match["number"])] = index
    for key in opened.keys() & sets.keys():
      _check_no_other(sets[key], opened[key], in_folder)
      lost |= _compare(sets[key], key[1], opened[key])
  return lost


def _folder(path: str) -> str:
  return path[: -len(fs.basename(path))] or "./"


def _check_no_other(
  known: ShardSet, opened: Mapping[int, ShardIndex], in_folder: Sequence[ShardIndex]
) -> None:
  """Raise ValueError if shards of the folder do not belong to the set."""
  for index in in_folder:
    name = fs.basename(index.path)
    if name.startswith((f"{known.split}-", f"{known.split}.")) and not NUMBERED.fullmatch(name):
      raise ValueError(
        f"{known.manifest}: split {known.split!r} has {len(opened)} shards here, and "
        f"{fs.printable(name)} next to them is not one of them; move it to another folder, or name "
        "the shards with a glob"
      )


def _compare(known: ShardSet, count: int, opened: Mapping[int, ShardIndex]) -> dict[str, int]:
  """Compare one set of shards; see `check_counts`."""
  if strangers := [index for number, index in sorted(opened.items()) if number >= count]:
    raise ValueError(
      f"{known.manifest}: split {known.split!r} has {count} shards, numbered from 0, and "
      f"{fs.printable(fs.basename(strangers[0].path))} is not one of them; remove it"
    )
  if known.records is not None:
    lost, problems = _compare_each(known.records, known.sizes, opened)
  elif len(opened) == count:
    lost, problems = _compare_total(known.total, list(opened.values()))
  else:
    return {}
  if not problems:
    in_order = [index for _, index in sorted(opened.items())]
    is_whole = len(opened) == count and not any(index.damage for index in in_order)
    if is_whole and known.fingerprint not in ("", fingerprint(in_order)):
      raise ValueError(
        f"{known.manifest}: the shards of split {known.split!r} are not the written ones; "
        "one was replaced by another or by a copy. Copy them again or write the data set again; "
        f"without {fs.basename(known.manifest)} they are read without this check"
      )
    return lost
  more = f" and {len(problems) - _SHOWN} more differ" if len(problems) > _SHOWN else ""
  raise ValueError(
    f"{known.manifest}: split {known.split!r} has {known.total} records, but "
    f"{', '.join(problems[:_SHOWN])}{more}. Copy these shards again or write the data set again; "
    f"without {fs.basename(known.manifest)} they are read without this check"
  )


def _compare_each(
  records: Sequence[int], sizes: Sequence[int] | None, opened: Mapping[int, ShardIndex]
) -> tuple[dict[str, int], list[str]]:
  """Return the damaged records by shard, and the shards that lack records without damage."""
  lost, problems = {}, []
  for number, index in sorted(opened.items()):
    difference = records[number] - len(index)
    is_truncated = sizes is not None and index.size != sizes[number]
    if not _is_explained(difference, [index], is_truncated):
      problems.append(f"{fs.basename(index.path)} holds {len(index)} of {records[number]}")
    elif sizes is not None and is_truncated and not index.damage:
      problems.append(f"{fs.basename(index.path)} has {index.size} bytes, not {sizes[number]}")
    elif index.damage:
      lost[index.path] = difference
  return lost, problems


def _compare_total(total: int, indexes: Sequence[ShardIndex]) -> tuple[dict[str, int], list[str]]:
  """Do the same if only the total of all shards is known."""
  found = sum(map(len, indexes))
  damaged = [index.path for index in indexes if index.damage]
  if _is_explained(total - found, indexes):
    return ({damaged[0]: total - found} if len(damaged) == 1 else {}), []
  fewest = sorted(indexes, key=len)[:_SHOWN]
  shown = ", ".join(f"{fs.basename(index.path)} with {len(index)}" for index in fewest)
  return {}, [f"its shards hold {found}; those with the fewest are {shown}"]


def _is_explained(
  difference: int, indexes: Sequence[ShardIndex], is_truncated: bool = False
) -> bool:
  """Return whether known damage explains the number of missing records.

  Args:
    difference: records in the manifest minus usable records.
    indexes: indexes of the compared shards.
    is_truncated: whether the size of the shard differs from the manifest.
  """
  damage = [damage for index in indexes for damage in index.damage]
  certain = sum(item.records or 1 for item in damage)
  open_ended = any(item.records is None for item in damage) and not is_truncated
  return difference >= 0 and (difference <= certain or open_ended)


def _dataset_sets(folder: str) -> _Sets:
  """Return the shard sets of `dataset.json`; empty if another program wrote that file."""
  path = fs.join(folder, MANIFEST)
  try:
    content = read_json(path)
    if not isinstance(content, dict):
      return {}
    if not str(content.get("format")).startswith("ov_data dataset"):
      if len(_OWN_KEYS & content.keys()) < len(_OWN_KEYS) - 1:
        return {}
      raise ValueError(f"format={content.get('format')!r:.40}")
    if "checksum" in content and content != add_checksum(content):
      raise ValueError("checksum")
    return dict(_own_set(path, *item) for item in content["splits"].items())
  except FileNotFoundError:
    return {}
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    reason = str(error) if str(path) in str(error) else f"{path} is damaged ({error})"
    raise ValueError(
      f"{reason}; copy it again, or remove it to read the shards without comparing their counts"
    ) from None


def _own_set(path: str, split: str, facts: Any) -> tuple[tuple[str, int, str], ShardSet]:
  shards, total = _natural(facts["shards"]), _natural(facts["examples"])
  records, sizes = (
    None if facts.get(name) is None else tuple(map(_natural, facts[name]))
    for name in ("records", "bytes")
  )
  if any(values is not None and len(values) != shards for values in (records, sizes)):
    raise ValueError(f"split {split!r} has {shards} shards and a different number of counts")
  if records is not None and sum(records) != total:
    raise ValueError(f"split {split!r} has {total} examples and {sum(records)} in its shards")
  written = facts.get("fingerprint", "")
  if not isinstance(written, str):
    raise TypeError(f"{written!r:.40} is not a fingerprint")
  return (split, shards, ".tfrecord"), ShardSet(path, split, total, records, sizes, written)


def _tfds_sets(folder: str) -> _Sets:
  """Return the shard sets of TensorFlow Datasets' `dataset_info.json` with default file names."""
  info = _tfds_info(folder)
  sets: _Sets = {}
  if info is None:
    return sets
  for split in info["splits"]:
    try:
      name, lengths = split["name"], tuple(int(n) for n in split["shardLengths"])
      template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
      stem = template.removesuffix("-{SHARD_X_OF_Y}")
      file_format = info.get("fileFormat", "tfrecord")
      for key, value in (("DATASET", info["name"]), ("SPLIT", name), ("FILEFORMAT", file_format)):
        stem = stem.replace(f"{{{key}}}", value)
    except (LookupError, TypeError, ValueError, AttributeError):
      continue  # reported by TensorFlow Datasets
    path = fs.join(folder, TFDS_INFO)
    sets[stem, len(lengths), ""] = ShardSet(path, name, sum(lengths), lengths, None)
  return sets


def _tfds_info(folder: str) -> dict[str, Any] | None:
  """Return the content of TensorFlow Datasets' `dataset_info.json`; None if there is none."""
  try:
    info = read_json(fs.join(folder, TFDS_INFO))
  except FileNotFoundError:
    return None
  # Hugging Face also writes a file of that name, with a dict of splits or with features.
  if not isinstance(info, dict) or "features" in info:
    return None
  splits = info.setdefault("splits", [])
  return info if isinstance(splits, list) else None


def _natural(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise TypeError(f"{value!r:.40} is not a number of records")
  return value
