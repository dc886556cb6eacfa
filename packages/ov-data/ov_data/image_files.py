"""Image collections in files, opened as records for the loader: see layouts/."""

from collections.abc import Sequence
import hashlib
import logging
from typing import Any

from ov_data import fs, layouts, links
from ov_data.layouts import classes, guess, json_lists, jsonl, karpathy, text_rules
from ov_data.layouts.imagefolder import METADATA
from ov_data.layouts.items import Item, Listing, Place
from ov_data.layouts.tree import Tree
from ov_data.pictures import Pictures, encoded
from ov_data.shards import is_shard
from ov_data.splits import Split

_PROBES = 16  # images looked for before the first is read
_EXPECTED = "expected a folder for each class, a list with captions, or record shards"

log = logging.getLogger("ov_data")


def open_image_files(
  path: str,
  split: Split,
  image_key: str,
  caption_keys: Sequence[str],
  image_root: str | None = None,
  format: str = "auto",
  follow_links: bool = False,
) -> Pictures | None:
  """Open a path whose images are files.

  Class folders are read in the order of a hash of each name, so that a slice such as "[:90%]" has
  its share of every class, and a new image changes the order of no others. Lists are read in their
  own order, captions next to images in the order of names.

  Args:
    path: a folder, a .jsonl file or a .json file.
    split: which part; the name of a folder, of a split in a list, or None for everything.
    image_key, caption_keys: features for the image and its captions.
    image_root: the folder of the images that a list names.
    format: one of `layouts.FORMATS`, or "auto".
    follow_links: whether links are followed that lead out of the folder, see `ov_data.links`.

  Returns:
    None where the path must hold record shards.

  Raises:
    ValueError: images are there, but in no layout that can be read, or not those of the split.
    OSError: a file or folder cannot be read.
  """
  if format not in ("auto", *layouts.FORMATS):
    raise ValueError(f"format={format!r}: expected 'auto' or one of {', '.join(layouts.FORMATS)}.")
  if fs.is_dir(path):
    found = _open_folder(path, split, image_root, format, follow_links)
    if found is None:
      return None
    root, listing, split = found
  elif format == "auto" and not path.endswith((".json", ".jsonl")) and not _is_metadata(path):
    return None
  else:
    root = image_root or jsonl.parent(path)
    place = Place(path, image_root or "", follow_links)
    format = _list_format(place) if format == "auto" else format
    if image_root and not layouts.LAYOUTS[format].takes_images:
      raise ValueError(f"image_root={image_root!r}: format {format} has its images next to {path}.")
    if format == "karpathy":
      return _split_file(place, root, split, image_key, caption_keys)
    listing = _read_list(place, format)
  if listing.format == "classes":
    return _classes(root, listing, split, image_key, follow_links)
  return _captions(path, root, listing, split, image_key, caption_keys, follow_links)


def _open_folder(
  path: str, split: Split, image_root: str | None, format: str, follow_links: bool
) -> tuple[str, Listing, Split] | None:
  """Return the folder of the images, its items, and the split still to be chosen among them."""
  top = fs.listdir(path)
  has_list = any(name in jsonl.LISTS or name in METADATA for name in top)
  split_is_folder = bool(split.name) and split.name in top and not has_list
  root = fs.join(path, split.name) if split.name and split_is_folder else path
  if not fs.is_dir(root):
    return None
  if format == "auto" and any(map(is_shard, fs.listdir(root))):
    return None
  place = Place(root, image_root or "", follow_links)
  if format == "auto":
    guessed = _guess(place)
    if guessed is None:
      return None
    format = guessed
  if not layouts.LAYOUTS[format].in_files:
    raise ValueError(
      f"{root} holds tar files, which the loader does not read; convert them to shards: "
      f"bazel run //tools/data:convert -- --input={root} --output=FOLDER"
    )
  if format == "classes":
    _check_classes(path, root, split, place.tree)
  listing = layouts.LAYOUTS[format].read(place)
  if split_is_folder:
    split = Split(None, split.slices)
  return image_root or root, listing, split


def _guess(place: Place) -> str | None:
  """Return the layout of a folder; None where there is nothing that could be images."""
  tree = place.tree
  is_list = any(
    name in jsonl.LISTS or name in METADATA for n in tree.folders.values() for name in n
  )
  has_images = any(guess.is_image(name) for _, name in tree.files())
  has_tars = any(name.lower().endswith(".tar") for name in tree.folders[""])
  if not is_list and not has_images and not has_tars:
    if tree.outside and not any(map(is_shard, tree.folders[""])):
      name, target = next(iter(tree.outside.items()))
      raise ValueError(f"{place.path}: {links.LEADS_OUT}: {links.describe(name, target)}")
    return None
  if has_images and has_tars and not is_list:
    return "classes"  # archives next to the folders that were unpacked from them
  return guess.guess_format(place, "format of a Source", strict=False)


def _list_format(place: Place) -> str:
  if not place.path.endswith(".json"):
    return "imagefolder" if _is_metadata(place.path) else "jsonl"
  return "coco" if place.images and json_lists.is_coco(place.content) else "karpathy"


def _read_list(place: Place, format: str) -> Listing:
  if format not in ("jsonl", "coco", "imagefolder"):
    raise ValueError(f"{place.path}: format {format} is a folder of images, and this is a file.")
  if not fs.exists(place.path):
    raise ValueError(f"{place.path}: no such file.")
  return layouts.LAYOUTS[format].read(place)


def _is_metadata(path: str) -> bool:
  return fs.basename(path) in METADATA


def _check_classes(path: str, root: str, split: Split, tree: Tree) -> None:
  """Raise ValueError where the folders are not those of classes, or lack the split asked for.

  Args:
    path: of the source.
    root: the folder in it whose folders should be classes; `path` where no split is chosen.
    split: which is asked for.
    tree: the files in `root`.
  """
  filled = tree.images_by_top
  splits, nested = classes.split_names(filled)
  missing = split.name if root == path else None
  if nested or (splits and splits == [*filled]):
    hint = f"split={missing!r} is none of them" if missing else "choose one with split=..."
    raise ValueError(f"{root} holds the splits {', '.join(splits)}; {hint}")
  if missing:
    raise ValueError(
      f"{path} has no folder of split {missing!r}, but the class folders "
      f"{', '.join(tree.top[:8])}{' ...' if len(tree.top) > 8 else ''}; leave the split out, or "
      "take a part such as '[:90%]'"
    )
  if len(filled) == 1:
    raise ValueError(
      f"all images in {root} are in one folder, {', '.join(filled)}, which gives neither class "
      f"nor caption; {_EXPECTED}"
    )


def _classes(
  root: str, listing: Listing, split: Split, image_key: str, follow_links: bool
) -> Pictures:
  names = listing.class_names or ()
  numbers = {name: number for number, name in enumerate(names)}
  entries = sorted(
    (hashlib.blake2b(encoded(item.key), digest_size=8).digest(), item.key, numbers[item.label])
    for item in listing.items
    if item.label is not None
  )
  kept = [entries[i] for i in split.range(len(entries))]
  _log_skips(root, listing)

  def features(label: int) -> dict[str, Any]:
    return {"label": label, "class": names[label]}

  files = [name for _, name, _ in kept]
  labels = [label for _, _, label in kept]
  return Pictures(root, files, labels, features, image_key, names, listing.skips, follow_links)


def _split_file(
  place: Place, root: str, split: Split, image_key: str, caption_keys: Sequence[str]
) -> Pictures:
  """Return the images of a split in one of Karpathy's files."""
  entries = karpathy.entries(place)
  chosen = _chosen(place.path, split, [entry[1] for entry in entries])
  names = [entries[i][0] for i in chosen]
  _check_some_exist(place.path, root, names, place.follow_links)
  sentences = [entries[i][2] for i in chosen]
  return Pictures(
    root,
    names,
    sentences,
    lambda s: dict.fromkeys(caption_keys, s),
    image_key,
    follow_links=place.follow_links,
  )


def _captions(
  path: str,
  root: str,
  listing: Listing,
  split: Split,
  image_key: str,
  caption_keys: Sequence[str],
  follow_links: bool,
) -> Pictures:
  """Return the images of any other layout, with captions, labels or both."""
  splits = [item.split or None for item in listing.items]
  items = [listing.items[i] for i in _chosen(path, split, splits)]
  _check_some_exist(path, root, [item.key for item in items], follow_links)
  _log_skips(path, listing)
  labels = sorted({item.label for item in listing.items if item.label is not None})
  numbers = {label: number for number, label in enumerate(labels)}
  has_captions = any(item.captions for item in listing.items)

  def fact(item: Item) -> list[Any]:
    return [list(item.captions), None if item.label is None else numbers[item.label]]

  def features(fact: list[Any]) -> dict[str, Any]:
    captions, label = fact
    found = dict.fromkeys(caption_keys, captions) if has_captions else {}
    return found if label is None else {**found, "label": label, "class": labels[label]}

  return Pictures(
    root,
    [item.key for item in items],
    [fact(item) for item in items],
    features,
    image_key,
    tuple(labels) or None,
    listing.skips,
    follow_links,
  )


def _chosen(path: str, split: Split, splits: Sequence[str | None]) -> list[int]:
  """Return the numbers of the images in the split; `splits` names that of each."""
  kept = list(range(len(splits)))
  if split.name:
    known = dict.fromkeys(map(str, splits))
    wanted = split.name.split("+")
    if not any(splits):
      raise ValueError(
        f"{path} has no splits, and split={split.name!r} names one; leave it out, or take a part "
        "such as '[:90%]'"
      )
    if unknown := [name for name in wanted if name not in known]:
      raise ValueError(f"{path} has the splits {', '.join(known)}; split={unknown[0]!r} is not one")
    kept = [i for i in kept if splits[i] in wanted]
  return [kept[i] for i in split.range(len(kept))]


def _check_some_exist(path: str, root: str, names: Sequence[str], follow_links: bool) -> None:
  some = [names[i] for i in range(0, len(names), len(names) // _PROBES + 1)]
  outside = {name: links.target_outside(root, name) for name in some if not follow_links}
  if some and all(map(outside.get, some)):
    name = some[0]
    raise ValueError(
      f"{path}: all images lead out of {root} by links, for instance "
      f"{links.describe(name, outside[name] or '')}"
    )
  probes = [fs.join(root, name) for name in some]
  if probes and not any(map(fs.exists, probes)):
    raise ValueError(
      f"none of {len(probes)} images of {path} exists, for instance {probes[0]}; set "
      f"image_root to the folder that holds {names[0].partition('/')[0]}"
    )


def _log_skips(path: str, listing: Listing) -> None:
  """Log what gives no record, and what was passed over."""
  found: dict[str, list[str]] = {}
  path = fs.printable(path)
  for skip in listing.skips:
    found.setdefault(skip.reason, []).append(skip.key)
  for reason, keys in found.items():
    log.warning(
      "%s: left out %d: %s; the first is %s", path, len(keys), reason, text_rules.printable(keys[0])
    )
  if listing.notes.counts:
    log.info("%s: %s", path, listing.notes)
