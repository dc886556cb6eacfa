"""How many records a data set should have, from its manifest, and whether its shards hold them.

A folder of shards may have `dataset.json` (of `ov_data.writer`) or `dataset_info.json` (of
TensorFlow Datasets). Both count the records. Shards that arrived empty, or were cut between two
records, have no other sign of what is missing.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from typing import Any

import google_crc32c

from ov_data import fs
from ov_data.index import ShardIndex
from ov_data.shard_names import NUMBERED

FORMAT = "ov_data dataset 1"
MANIFEST = "dataset.json"
SKIPPED = "skipped.jsonl"
TFDS_INFO = "dataset_info.json"  # in every directory of TensorFlow Datasets

_OWN_KEYS = frozenset(("format", "recipe", "features", "splits", "skipped"))
_MOST_BYTES = 256 << 20
_SHOWN = 4  # shards in a message


@dataclasses.dataclass(frozen=True)
class ShardSet:
  """Shards NAME-00000-of-00004, NAME-00001-of-00004 ... of one split.

  Attributes:
    manifest: the file that counts them.
    split: its name.
    total: records in all shards.
    records: those of each shard; None where the manifest knows only the total.
    sizes: bytes of each shard, if known.
    fingerprint: of all shards, see `fingerprint`; "" if unknown.
  """

  manifest: str
  split: str
  total: int
  records: tuple[int, ...] | None
  sizes: tuple[int, ...] | None
  fingerprint: str = ""


# (stem, number of shards, ending) of file names -> what the manifest says
_Sets = dict[tuple[str, int, str], ShardSet]


def read_json(path: str) -> Any:
  """Return the content of a JSON file.

  Raises:
    FileNotFoundError: there is no regular file of that name.
    ValueError: it is no JSON that can be parsed.
    OSError: it cannot be read.
  """
  try:
    return json.loads(fs.read_regular(path, _MOST_BYTES))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """Return the content of a manifest with its checksum."""
  content = {key: value for key, value in content.items() if key != "checksum"}
  canonical = json.dumps(content, sort_keys=True).encode()
  return {**content, "checksum": google_crc32c.value(canonical)}


def fingerprint(indexes: Sequence[ShardIndex]) -> str:
  """Return 16 hex digits of shard names, sizes, edge checksums and record counts; not of the place.

  Args:
    indexes: of the shards, in their order.
  """
  shards = [(fs.basename(i.path), i.size, i.fingerprint, len(i)) for i in indexes]
  return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def is_tfds(folder: str) -> bool:
  """Return whether a folder was written by TensorFlow Datasets."""
  return _tfds_info(folder) is not None


def check_counts(indexes: Sequence[ShardIndex]) -> dict[str, int]:
  """Compare the records of shards with the manifests in their folders.

  A record that the index knows to be damaged counts as one that is there.

  Args:
    indexes: of shards, from any folders; those without a manifest are not compared.

  Returns:
    The number of records lost to damage, by the paths of damaged shards that a manifest counts.

  Raises:
    ValueError: records are missing, there are more than the manifest says, or a shard was replaced
      by another one; names the shards where the manifest tells which.
  """
  folders: dict[str, list[ShardIndex]] = {}
  for index in {index.path: index for index in indexes}.values():
    folders.setdefault(index.path[: -len(fs.basename(index.path))] or "./", []).append(index)
  lost: dict[str, int] = {}
  for folder, inside in folders.items():
    sets = {**_tfds_sets(folder), **_own_sets(folder)}
    opened: dict[tuple[str, int, str], dict[int, ShardIndex]] = {}
    for index in inside if sets else ():
      if match := NUMBERED.fullmatch(fs.basename(index.path)):
        key = (match["stem"], int(match["count"]), match["rest"])
        opened.setdefault(key, {})[int(match["number"])] = index
    for key in opened.keys() & sets.keys():
      _check_no_other(sets[key], opened[key], inside)
      lost |= _compare(sets[key], key[1], opened[key])
  return lost


def _check_no_other(
  known: ShardSet, opened: Mapping[int, ShardIndex], inside: Sequence[ShardIndex]
) -> None:
  """Raise ValueError for shards read together with a set of which they are no part."""
  for index in inside:
    name = fs.basename(index.path)
    if name.startswith((f"{known.split}-", f"{known.split}.")) and not NUMBERED.fullmatch(name):
      raise ValueError(
        f"{known.manifest}: split {known.split!r} has {len(opened)} shards here, and "
        f"{fs.printable(name)} next to them is none of them; move it to another folder, or name "
        "the shards with a glob"
      )


def _compare(known: ShardSet, count: int, opened: Mapping[int, ShardIndex]) -> dict[str, int]:
  """Compare one set of shards; see `check_counts`."""
  if strangers := [index for number, index in sorted(opened.items()) if number >= count]:
    raise ValueError(
      f"{known.manifest}: split {known.split!r} has {count} shards, numbered from 0, and "
      f"{fs.printable(fs.basename(strangers[0].path))} is none of them; remove it"
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
        f"{known.manifest}: the shards of split {known.split!r} are not those that were written; "
        "one was replaced by another or by a copy. Copy them again or write the data set anew; "
        f"without {fs.basename(known.manifest)} they are read as they are"
      )
    return lost
  more = f" and {len(problems) - _SHOWN} more differ" if len(problems) > _SHOWN else ""
  raise ValueError(
    f"{known.manifest}: split {known.split!r} has {known.total} records, but "
    f"{', '.join(problems[:_SHOWN])}{more}. Copy these shards again or write the data set anew; "
    f"without {fs.basename(known.manifest)} they are read as they are"
  )


def _compare_each(
  records: Sequence[int], sizes: Sequence[int] | None, opened: Mapping[int, ShardIndex]
) -> tuple[dict[str, int], list[str]]:
  """Return the records lost to damage by shard, and which shards lack records without damage."""
  lost, problems = {}, []
  for number, index in sorted(opened.items()):
    difference = records[number] - len(index)
    torn = sizes is not None and index.size != sizes[number]
    if not _is_explained(difference, [index], torn):
      problems.append(f"{fs.basename(index.path)} holds {len(index)} of {records[number]}")
    elif sizes is not None and torn and not index.damage:
      problems.append(f"{fs.basename(index.path)} has {index.size} bytes, not {sizes[number]}")
    elif index.damage:
      lost[index.path] = difference
  return lost, problems


def _compare_total(total: int, indexes: Sequence[ShardIndex]) -> tuple[dict[str, int], list[str]]:
  """Do the same where only the total of all shards is known."""
  found = sum(map(len, indexes))
  damaged = [index.path for index in indexes if index.damage]
  if _is_explained(total - found, indexes):
    return ({damaged[0]: total - found} if len(damaged) == 1 else {}), []
  fewest = sorted(indexes, key=len)[:_SHOWN]
  shown = ", ".join(f"{fs.basename(index.path)} with {len(index)}" for index in fewest)
  return {}, [f"its shards hold {found}; those with the fewest are {shown}"]


def _is_explained(difference: int, indexes: Sequence[ShardIndex], torn: bool = False) -> bool:
  """Return whether damage that is known explains why so many records are not there.

  Args:
    difference: records in the manifest less usable records.
    indexes: of the shards compared.
    torn: whether bytes of them are missing.
  """
  damage = [damage for index in indexes for damage in index.damage]
  certain = sum(item.records or 1 for item in damage)
  open_ended = any(item.records is None for item in damage) and not torn
  return difference >= 0 and (difference <= certain or open_ended)


def _own_sets(folder: str) -> _Sets:
  """Return what `dataset.json` counts; nothing if another program wrote that file."""
  path = fs.join(folder, MANIFEST)
  try:
    content = read_json(path)
    if not isinstance(content, dict):
      return {}
    if not str(content.get("format")).startswith("ov_data dataset"):
      if len(_OWN_KEYS & content.keys()) < len(_OWN_KEYS) - 1:
        return {}
      raise ValueError(f"format={content.get('format')!r:.40}")
    if "checksum" in content and content != sealed(content):
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
    raise ValueError(f"split {split!r} has {shards} shards and other numbers of counts")
  if records is not None and sum(records) != total:
    raise ValueError(f"split {split!r} has {total} examples and {sum(records)} in its shards")
  written = facts.get("fingerprint", "")
  if not isinstance(written, str):
    raise TypeError(f"{written!r:.40} is no fingerprint")
  return (split, shards, ".tfrecord"), ShardSet(path, split, total, records, sizes, written)


def _tfds_sets(folder: str) -> _Sets:
  """Return what `dataset_info.json` of TensorFlow Datasets counts, for its usual file names."""
  info = _tfds_info(folder)
  sets: _Sets = {}
  if info is None:
    return sets
  for split in info["splits"]:
    try:
      name, lengths = split["name"], tuple(int(n) for n in split["shardLengths"])
      template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
      stem = template.removesuffix("-{SHARD_X_OF_Y}")
      for key, value in (("DATASET", info["name"]), ("SPLIT", name), ("FILEFORMAT", "tfrecord")):
        stem = stem.replace(f"{{{key}}}", value)
    except (LookupError, TypeError, ValueError, AttributeError):
      continue  # TensorFlow Datasets itself reports what is wrong there
    path = fs.join(folder, TFDS_INFO)
    sets[stem, len(lengths), ""] = ShardSet(path, name, sum(lengths), lengths, None)
  return sets


def _tfds_info(folder: str) -> dict[str, Any] | None:
  """Return the content of `dataset_info.json`; None if there is none of TensorFlow Datasets."""
  try:
    info = read_json(fs.join(folder, TFDS_INFO))
  except FileNotFoundError:
    return None
  # Hugging Face writes a file of that name too, with a dict of splits, or with the features.
  if not isinstance(info, dict) or "features" in info:
    return None
  splits = info.setdefault("splits", [])
  return info if isinstance(splits, list) else None


def _natural(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise TypeError(f"{value!r:.40} is no number of records")
  return value
