"""Resolution of a path to shards: a folder, a file, a sharded name, a range, or a glob.

A path that exists is used literally. Otherwise `data/train@8` and `data/train@` are sharded names,
`data/{00000..00099}.tar` is a range, and `*`, `?` and `[...]` are wildcards. Existing folders in a
glob are also literal, for example `b[1]` in `b[1]/train-*`.
"""

from collections.abc import Callable, Iterable, Sequence
import fnmatch
import glob
import itertools
import re

from ov_data import foreign, fs
from ov_data.index.kind import TFRECORD, ShardKind

NUMBERED = re.compile(r"(?P<stem>.*?)[-.](?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<rest>.*)", re.S)
_SHARDED = re.compile(r"(.+)@(\d*)", re.S)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
DAMAGED = ".damaged"  # suffix of damaged shards that a writer has renamed
_NOT_SHARD = (".ovidx", ".part", ".json", ".txt", ".tmp", DAMAGED)
_SHOWN = 4  # maximum number of names in a message
_MAX_SHARDS = 1_000_000  # maximum number of shards whose missing names are listed


def is_shard(name: str, kind: ShardKind = TFRECORD) -> bool:
  """Return whether the file name is the name of a shard."""
  return bool(kind.names.fullmatch(fs.basename(name))) and not name.endswith(_NOT_SHARD)


def names_at(path: str, split: str | None = None) -> list[str]:
  """Return the names of the files of any format that may be shards of a path."""
  if fs.is_dir(path):
    names = fs.listdir(path)
    if split and split in names and fs.is_dir(fs.join(path, split)):
      return fs.listdir(fs.join(path, split))
    return names
  if fs.exists(path):
    return [path]
  found: list[str] = []
  for part in expand_ranges(path):
    found += fs.glob(_escape_existing(part)) if glob.has_magic(part) else [part]
  if not fs.is_remote(path) and (match := _SHARDED.fullmatch(path)):
    found += _sharded_name(match[1], _count(match))
  return found


def expand_ranges(path: str) -> list[str]:
  """Expand ranges: data-{008..010}.tar becomes data-008.tar, data-009.tar, data-010.tar.

  Raises:
    ValueError: if a range is too large.
  """
  match = _RANGE.search(path)
  if not match:
    return [path]
  low, high = match.groups()
  if (count := int(high) - int(low) + 1) > _MAX_SHARDS:
    raise ValueError(f"{path}: a range of {count:,} files; expected at most {_MAX_SHARDS:,}.")
  return [
    expanded
    for i in range(int(low), int(high) + 1)
    for expanded in expand_ranges(
      path[: match.start()] + str(i).zfill(len(low)) + path[match.end() :]
    )
  ]


def find_shards(path: str, split: str | None = None, kind: ShardKind = TFRECORD) -> list[str]:
  """Return the sorted shards of a path and, for a folder, of a split.

  Raises:
    ValueError: if there are no shards, files are not shards, shards are missing, or there are
      several splits and `split` is None.
  """
  fs.check_name(path)
  if fs.is_dir(path):
    return _in_folder(path, split, kind)
  if fs.exists(path):
    if not is_shard(path, kind) and (what := foreign.describe([path], with_name=False)):
      raise ValueError(f"{path} is {what}")
    return [path]
  if _RANGE.search(path):
    return _in_range(path, kind)
  hint = _no_such_file(path)
  if match := _SHARDED.fullmatch(path):
    if shards := _sharded_name(match[1], _count(match)):
      _check_complete(shards)
      return shards
    hint = f"no file is named {match[1]}-?????-of-{_count(match)}"
    hint += _names_there(_sharded_name(match[1], "?????"))
  if glob.has_magic(path):
    pattern = _escape_existing(path)
    found = fs.glob(pattern)
    if shards := [name for name in found if is_shard(name, kind)]:
      _check_complete(shards, lambda name: fnmatch.fnmatchcase(name, pattern))
      return shards
    if "@" not in hint:
      hint = _no_match(path, found)
  raise ValueError(f"no shards at {path}: {hint}")


def _count(match: re.Match[str]) -> str:
  """Return the pattern of the number of shards in `data/train@8`."""
  return match[2].zfill(5) if match[2] else "?????"


def _in_range(path: str, kind: ShardKind) -> list[str]:
  shards: list[str] = []
  missing: list[str] = []
  names: dict[str, set[str]] = {}  # by folder
  for part in expand_ranges(path):
    if glob.has_magic(part):
      found = [name for name in fs.glob(_escape_existing(part)) if is_shard(name, kind)]
    else:
      folder, slash, name = part.rpartition("/")
      if folder not in names:
        where = folder + slash or "."
        names[folder] = set(fs.listdir(where)) if fs.is_dir(where) else set()
      found = [part] if name in names[folder] else []
    shards += found
    missing += [] if found else [part]
  if missing:
    count = len(expand_ranges(path))
    raise ValueError(
      f"no shards at {path}: {len(missing)} of {count} files are missing, {missing[0]} is the "
      "first; complete the copy, or correct the range"
    )
  return shards


def find_all(path: str, kind: ShardKind = TFRECORD) -> list[str]:
  """Return the shards of all splits of a path, or of the subfolders of a folder without shards.

  Raises:
    ValueError: see `find_shards`.
  """
  if not fs.is_dir(path):
    return find_shards(path, kind=kind)
  names = fs.listdir(path)
  shards = [fs.join(path, name) for name in names if is_shard(name, kind)]
  if not shards:
    folders = [fs.join(path, name) for name in names if not name.endswith(_NOT_SHARD)]
    for folder in filter(fs.is_dir, folders):
      shards += [fs.join(folder, name) for name in fs.listdir(folder) if is_shard(name, kind)]
  if not shards:
    _in_folder(path, None, kind)  # raises the error
  _check_complete(shards)
  return shards


def _in_folder(path: str, split: str | None, kind: ShardKind) -> list[str]:
  names_in_folder = fs.listdir(path)
  if split and split in names_in_folder and fs.is_dir(fs.join(path, split)):
    return find_shards(fs.join(path, split), kind=kind)
  names = [name for name in names_in_folder if is_shard(name, kind)]
  splits = sorted({_stem(name, kind) for name in names})
  if not split and len(splits) > 1:
    raise ValueError(
      f"{path} contains several splits ({', '.join(splits)}); choose one with split=..., "
      "or name the shards with a glob"
    )
  shards = [fs.join(path, name) for name in names if _in_split(name, split)]
  if not shards:
    hint = (
      f"no *{kind.suffix} file of split {split!r} in it"
      if split
      else f"no *{kind.suffix} file in it"
    )
    if splits:
      hint += f"; its splits are {', '.join(splits[:_SHOWN])}"
    elif what := foreign.describe(names_in_folder):
      hint += f"; it holds {what}"
    else:
      hint += _numbered_without_ending(names_in_folder) or _folders_with_shards(
        path, names_in_folder
      )
    raise ValueError(f"no shards at {path}: {hint}")
  _check_complete(shards)
  return shards


def _no_such_file(path: str) -> str:
  if fs.is_link(path):
    return "it is a broken link"
  hint = "no such file or directory"
  if match := re.match(r"([a-z][a-z0-9]+):/(?!/)", path):
    hint += f"; did you mean {match[1]}://{path[match.end() :]}"
  if re.search(r"\{.*(,|\.\.).*\}", path):
    hint += (
      "; braces are only supported in ranges such as {00000..00099}; use a glob such as train-*"
    )
  return hint


def _no_match(path: str, found: Sequence[str]) -> str:
  """Return the reason why a glob matches no shard."""
  if what := foreign.describe(found):
    return f"the match is {what}"
  if found:
    hint = _numbered_without_ending(found) or f": {_listed(map(fs.basename, found))}"
    return f"{len(found)} files match, and none has the name of a shard (*.tfrecord*){hint}"
  folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
  there = fs.listdir(folder) if fs.is_dir(folder) else []
  return "no file matches" + _names_there(there)


def _numbered_without_ending(names: Iterable[str]) -> str:
  for name in names:
    if not name.endswith(_NOT_SHARD) and (match := NUMBERED.fullmatch(fs.basename(name))):
      sharded = f"{match['stem']}@{int(match['count'])}"
      return f"; {fs.basename(name)} lacks that suffix: rename the files, or use {sharded}"
  return ""


def _folders_with_shards(path: str, names: Sequence[str]) -> str:
  """Return which subfolders have shards, for example versions of a TFDS data set."""
  for name in [name for name in names if not name.startswith(".")][:_SHOWN]:
    folder = fs.join(path, name)
    if fs.is_dir(folder) and any(map(is_shard, fs.listdir(folder))):
      return f"; its subfolder {fs.printable(name)} has some: use {fs.printable(folder)}"
  return ""


def _names_there(names: Sequence[str]) -> str:
  names = [name for name in names if not name.endswith((".ovidx", ".part"))]
  return f"; there are {_listed(map(fs.basename, names))}" if names else ""


def _listed(names: Iterable[str]) -> str:
  shown = list(itertools.islice(names, _SHOWN + 1))
  text = ", ".join(map(fs.printable, shown[:_SHOWN]))
  return f"{text} ..." if len(shown) > _SHOWN else text


def _stem(name: str, kind: ShardKind) -> str:
  match = NUMBERED.fullmatch(name)
  if match:
    return match["stem"]
  return name.partition(kind.suffix.rstrip("*")[:6])[0].rstrip("-0123456789")


def _in_split(name: str, split: str | None) -> bool:
  return not split or name.startswith((split + "-", split + "."))


def _sharded_name(stem: str, count: str) -> list[str]:
  """Return the files stem-NNNNN-of-COUNT*; expand wildcards in the stem only if none exist."""
  for pattern in dict.fromkeys((glob.escape(stem), _escape_existing(stem))):
    found = fs.glob(f"{pattern}-?????-of-{count}*")
    if shards := [name for name in found if not name.endswith(_NOT_SHARD)]:
      return shards
  return []


def _escape_existing(pattern: str) -> str:
  """Return the pattern with existing folders escaped."""
  *folders, last = pattern.split("/")
  literal = ""
  for number, folder in enumerate(folders):
    if glob.has_magic(folder):
      if not fs.is_dir(literal + folder):
        return "/".join((glob.escape(literal) + folder, *folders[number + 1 :], last))
    literal += folder + "/"
  return glob.escape(literal) + last


def _check_complete(
  shards: Sequence[str], is_meant: Callable[[str], bool] = lambda name: True
) -> None:
  """Raise ValueError unless every set a-00000-of-00004, a-00001-of-00004, ... is complete.

  Args:
    shards: paths of the shards.
    is_meant: function that returns whether a missing shard was requested.
  """
  families: dict[tuple[str, str], dict[str, set[int]]] = {}
  for shard in shards:
    name = fs.basename(shard)
    if match := NUMBERED.fullmatch(name):
      before = shard[: len(shard) - len(name) + match.start("number")]
      family = families.setdefault((before, match["rest"]), {})
      family.setdefault(match["count"], set()).add(int(match["number"]))
  for (before, rest), counts in families.items():
    stem = before[:-1]
    if len(counts) > 1:
      raise ValueError(
        f"{stem} contains shards of several sets ({', '.join(f'-of-{c}' for c in counts)}); remove "
        "the old ones, or choose with a glob such as "
        f"{fs.basename(stem)}-*-of-{next(iter(counts))}*"
      )
    for count, numbers in counts.items():
      if (last := max(numbers)) >= int(count):
        raise ValueError(
          f"{before}{last:05d}-of-{count}{rest}: shards are numbered from 0, so this is not one of "
          f"{int(count)}; remove or rename it"
        )
      missing = [n for n in range(min(int(count), _MAX_SHARDS)) if n not in numbers]
      first = next((n for n in missing if is_meant(f"{before}{n:05d}-of-{count}{rest}")), None)
      if first is not None:
        raise ValueError(
          f"{stem}: {len(missing)} of {int(count)} shards are missing (number {first} is the "
          "first); complete the copy, or choose shards with a glob without the missing ones"
        )
