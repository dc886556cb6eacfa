"""A folder of class folders as a source of labelled pictures.

photos/train/dog/1.jpg        with folders of splits, or photos/dog/1.jpg without
photos/train/cat/2.png
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import hashlib
import logging
import re
from typing import Any

from ov_data import fs
from ov_data.pictures import Pictures, encoded
from ov_data.shards import is_shard
from ov_data.splits import Split

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test)[-_]?\d*")  # train2014
_NO_CLASSES = frozenset({"", "__MACOSX", "lost+found"})  # left by archives and file systems
_WORKERS = 16  # threads that list folders

_EXPECTED = "expected a folder for each class, a split file with captions, or record shards"

log = logging.getLogger("ov_data")


def open_folders(path: str, split: Split, image_key: str) -> Pictures | None:
  """The pictures below a folder of class folders, in an order that mixes the classes.

  The order follows from a hash of each name, so that a slice such as "[:90%]" has its share of
  every class, and a new picture changes the order of no others. Labels are the numbers of the
  sorted folders, also of those without pictures. What is hidden, or no picture by its name, is
  passed over; so are links to folders inside a class.

  Returns:
    None where the folder holds something else.

  Raises:
    ValueError: pictures are there, but not those of the split, or not in at least two class
      folders.
  """
  inside = fs.listdir(path)
  has_split = split.name in inside
  root = fs.join(path, split.name) if split.name and has_split else path
  if not fs.is_dir(root):
    return None
  inside = [name for name in fs.listdir(root) if not _is_hidden(name)]
  if any(map(is_shard, inside)):
    return None
  strays = [name for name in inside if _is_picture(name)]
  others = [name for name in inside if not _is_picture(name)]
  with futures.ThreadPoolExecutor(_WORKERS, "ov-list") as pool:
    are_folders = pool.map(fs.is_dir, [fs.join(root, name) for name in others])
    folders = [name for name, is_folder in zip(others, are_folders) if is_folder]
    found = list(pool.map(lambda name: _pictures_below(fs.join(root, name)), folders))
  if not any(found):
    if strays:
      raise ValueError(
        f"pictures lie in {root} itself, which says neither class nor caption; {_EXPECTED}"
      )
    return None
  _check_classes(path, root, split, dict(zip(folders, found)))
  if strays:
    log.warning(
      "%d pictures in %s are in no class folder and left out, %s is the first",
      len(strays),
      root,
      strays[0],
    )
  entries = sorted(
    (hashlib.blake2b(encoded(name), digest_size=8).digest(), name, label)
    for label, (folder, names) in enumerate(zip(folders, found))
    for name in (f"{folder}/{below}" for below in names)
  )
  kept = [entries[i] for i in split.range(len(entries))]

  def features(label: int) -> dict[str, Any]:
    return {"label": label, "class": folders[label]}

  names = [name for _, name, _ in kept]
  labels = [label for _, _, label in kept]
  return Pictures(root, names, labels, features, image_key, class_names=tuple(folders))


def _check_classes(path: str, root: str, split: Split, found: Mapping[str, Sequence[str]]) -> None:
  """Raises ValueError where the folders are not those of classes, or lack the split asked for.

  Args:
    path: of the source.
    root: the folder in it whose folders should be classes; `path` where no split is chosen.
    split: which is asked for.
    found: the folders with the pictures below each.
  """
  filled = {name: names for name, names in found.items() if names}
  splits = [name for name in filled if _SPLIT.fullmatch(name.lower())]
  nested = any("/" in below for name in splits for below in filled[name])
  missing = split.name if root == path else None
  if nested or splits == [*filled]:
    hint = f"split={missing!r} is none of them" if missing else "choose one with split=..."
    raise ValueError(f"{root} holds the splits {', '.join(splits)}; {hint}")
  if missing:
    raise ValueError(
      f"{path} has no folder of split {missing!r}, but the class folders "
      f"{', '.join(list(found)[:8])}{' ...' if len(found) > 8 else ''}; leave the split out, or "
      "take a part such as '[:90%]'"
    )
  if len(filled) == 1:
    raise ValueError(
      f"all pictures in {root} lie in one folder, {', '.join(filled)}, which says neither class "
      f"nor caption; {_EXPECTED}"
    )


def _pictures_below(folder: str) -> list[str]:
  """Names relative to the folder. Links to folders are not followed: they may go round."""
  names, todo = [], [""]
  while todo:
    below = todo.pop()
    for name in fs.listdir(fs.join(folder, below) if below else folder):
      inner = f"{below}/{name}" if below else name
      if _is_hidden(name):
        continue
      if _is_picture(name):
        names.append(inner)
      elif fs.is_dir(path := fs.join(folder, inner)) and not fs.is_link(path):
        todo.append(inner)
  return names


def _is_picture(name: str) -> bool:
  return name.lower().endswith(_EXTENSIONS)


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name in _NO_CLASSES
