"""Which files a path means: a folder of shards, one shard, a sharded name, or a glob.

A path that exists is taken literally, whatever characters it has. Only then `data/train@8` and
`data/train@` are sharded names, and `*`, `?` and `[...]` are wildcards; folders of a glob that
exist are literal too, as `b[1]` in `b[1]/train-*`.
"""

from collections.abc import Callable, Iterable, Sequence
import fnmatch
import glob
import itertools
import re

from ov_data import foreign, fs

NUMBERED = re.compile(r"(?P<stem>.*?)[-.](?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<rest>.*)", re.S)
_IS_SHARD = re.compile(r".*\.tfrec(ord)?s?([-.].*)?", re.S)
DAMAGED = ".damaged"  # ends the names of shards that a writer has set aside
_NOT_SHARD = (".ovidx", ".part", ".json", ".txt", ".tmp", DAMAGED)
_SHOWN = 4  # names in a message
_MOST_SHARDS = 1_000_000  # of one family whose missing members are listed


def is_shard(name: str) -> bool:
  """Return whether a file of that name is a shard."""
  return bool(_IS_SHARD.fullmatch(fs.basename(name))) and not name.endswith(_NOT_SHARD)


def find_shards(path: str, split: str | None = None) -> list[str]:
  """Return the shards that a path (and the name of a split, for a folder) means, sorted.

  Raises:
    ValueError: nothing there, something else than shards, some of the shards missing, or several
      splits and none chosen.
  """
  fs.check_name(path)
  if fs.is_dir(path):
    return _in_folder(path, split)
  if fs.exists(path):
    if not is_shard(path) and (what := foreign.describe([path], with_name=False)):
      raise ValueError(f"{path} is {what}")
    return [path]
  hint = _no_such_file(path)
  if match := re.fullmatch(r"(.+)@(\d*)", path, re.S):
    if shards := _sharded_name(match[1], match[2].zfill(5) if match[2] else "?????"):
      _check_complete(shards)
      return shards
    hint = f"no file is named {match[1]}-?????-of-{match[2].zfill(5) if match[2] else '?????'}"
    hint += _names_there(_sharded_name(match[1], "?????"))
  if glob.has_magic(path):
    pattern = _escape_existing(path)
    found = fs.glob(pattern)
    if shards := [name for name in found if is_shard(name)]:
      _check_complete(shards, lambda name: fnmatch.fnmatchcase(name, pattern))
      return shards
    if "@" not in hint:
      hint = _no_match(path, found)
  raise ValueError(f"no shards at {path}: {hint}")


def find_all(path: str) -> list[str]:
  """Return the shards of all splits that a path means; of a folder without any, of its folders.

  Raises:
    ValueError: as `find_shards`.
  """
  if not fs.is_dir(path):
    return find_shards(path)
  names = fs.listdir(path)
  shards = [fs.join(path, name) for name in names if is_shard(name)]
  if not shards:
    folders = [fs.join(path, name) for name in names if not name.endswith(_NOT_SHARD)]
    for folder in filter(fs.is_dir, folders):
      shards += [fs.join(folder, name) for name in fs.listdir(folder) if is_shard(name)]
  if not shards:
    _in_folder(path, None)  # raises: says what is there instead
  _check_complete(shards)
  return shards


def _in_folder(path: str, split: str | None) -> list[str]:
  inside = fs.listdir(path)
  if split and split in inside and fs.is_dir(fs.join(path, split)):
    return find_shards(fs.join(path, split))
  names = [name for name in inside if is_shard(name)]
  splits = sorted({_stem(name) for name in names})
  if not split and len(splits) > 1:
    raise ValueError(
      f"{path} holds several splits ({', '.join(splits)}); choose one with split=..., "
      "or name the shards with a glob"
    )
  shards = [fs.join(path, name) for name in names if _in_split(name, split)]
  if not shards:
    hint = f"no *.tfrecord* file of split {split!r} in it" if split else "no *.tfrecord* file in it"
    if splits:
      hint += f"; its splits are {', '.join(splits[:_SHOWN])}"
    elif what := foreign.describe(inside):
      hint += f"; it holds {what}"
    else:
      hint += _numbered_without_ending(inside) or _folders_with_shards(path, inside)
    raise ValueError(f"no shards at {path}: {hint}")
  _check_complete(shards)
  return shards


def _no_such_file(path: str) -> str:
  if fs.is_link(path):
    return "it is a link whose target is missing"
  hint = "no such file or directory"
  if match := re.match(r"([a-z][a-z0-9]+):/(?!/)", path):
    hint += f"; did you mean {match[1]}://{path[match.end() :]}"
  if re.search(r"\{.*(,|\.\.).*\}", path):
    hint += "; braces have no meaning here, use a glob such as train-* or train@8"
  return hint


def _no_match(path: str, found: Sequence[str]) -> str:
  """Return why a glob gives no shard."""
  if what := foreign.describe(found):
    return f"what matches is {what}"
  if found:
    hint = _numbered_without_ending(found) or f": {_listed(map(fs.basename, found))}"
    return f"{len(found)} files match, and none is named like a shard (*.tfrecord*){hint}"
  folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
  there = fs.listdir(folder) if fs.is_dir(folder) else []
  return "no file matches" + _names_there(there)


def _numbered_without_ending(names: Iterable[str]) -> str:
  for name in names:
    if not name.endswith(_NOT_SHARD) and (match := NUMBERED.fullmatch(fs.basename(name))):
      sharded = f"{match['stem']}@{int(match['count'])}"
      return f"; {fs.basename(name)} lacks that ending: rename the files, or give {sharded}"
  return ""


def _folders_with_shards(path: str, names: Sequence[str]) -> str:
  """Return which folders in a folder have shards, as the versions of a TFDS data set do."""
  for name in [name for name in names if not name.startswith(".")][:_SHOWN]:
    folder = fs.join(path, name)
    if fs.is_dir(folder) and any(map(is_shard, fs.listdir(folder))):
      return f"; its folder {fs.printable(name)} has some: give {fs.printable(folder)}"
  return ""


def _names_there(names: Sequence[str]) -> str:
  names = [name for name in names if not name.endswith((".ovidx", ".part"))]
  return f"; there are {_listed(map(fs.basename, names))}" if names else ""


def _listed(names: Iterable[str]) -> str:
  shown = list(itertools.islice(names, _SHOWN + 1))
  text = ", ".join(map(fs.printable, shown[:_SHOWN]))
  return f"{text} ..." if len(shown) > _SHOWN else text


def _stem(name: str) -> str:
  match = NUMBERED.fullmatch(name)
  return match["stem"] if match else name.partition(".tfrec")[0].rstrip("-0123456789")


def _in_split(name: str, split: str | None) -> bool:
  return not split or name.startswith((split + "-", split + "."))


def _sharded_name(stem: str, count: str) -> list[str]:
  """Return the files stem-NNNNN-of-COUNT*; wildcards in the stem count only if it gives none."""
  for pattern in dict.fromkeys((glob.escape(stem), _escape_existing(stem))):
    found = fs.glob(f"{pattern}-?????-of-{count}*")
    if shards := [name for name in found if not name.endswith(_NOT_SHARD)]:
      return shards
  return []


def _escape_existing(pattern: str) -> str:
  """Return the pattern with the folders that exist under that very name made literal."""
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
  """Raise ValueError unless every family a-00000-of-00004, a-00001-of-00004 ... is whole.

  Args:
    shards: paths.
    is_meant: whether a missing shard of this path was requested.
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
        f"{stem} has shards of several sets ({', '.join(f'-of-{c}' for c in counts)}); remove the "
        f"old ones, or choose with a glob such as {fs.basename(stem)}-*-of-{next(iter(counts))}*"
      )
    for count, numbers in counts.items():
      if (last := max(numbers)) >= int(count):
        raise ValueError(
          f"{before}{last:05d}-of-{count}{rest}: shards are numbered from 0, so this is none of "
          f"{int(count)}; remove or rename it"
        )
      missing = [n for n in range(min(int(count), _MOST_SHARDS)) if n not in numbers]
      first = next((n for n in missing if is_meant(f"{before}{n:05d}-of-{count}{rest}")), None)
      if first is not None:
        raise ValueError(
          f"{stem}: {len(missing)} of {int(count)} shards are missing (number {first} is the "
          "first); complete the copy, or choose shards with a glob that leaves the missing ones out"
        )
