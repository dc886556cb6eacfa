"""Record source over folders and lists of images in the layouts of `ov_data.layouts`."""

import dataclasses
import hashlib
import logging

from ov_data import fs, layouts, links
from ov_data.image_files import ImageFiles, check_some_exist, encode_text, select_split
from ov_data.layouts import Collection, Listing, classes, guess, jsonl, text_rules
from ov_data.layouts.imagefolder import METADATA
from ov_data.layouts.images import UndefinedLayout
from ov_data.layouts.tree import Tree
from ov_data.record_source import RecordSource
from ov_data.request import Request, Source
from ov_data.shard_names import is_shard
from ov_data.splits import Split

_EXPECTED = "expected a folder for each class, a list with captions, or record shards"

log = logging.getLogger("ov_data")


def open_images(request: Request) -> RecordSource | None:
  """Open a folder of images, or a list of images other than a Karpathy split file.

  Images of class folders are ordered by a hash of their names, so a slice such as "[:90%]" contains
  about 90% of every class, and a new image does not change the order of the others. Lists keep
  their order; images with sidecar captions are ordered by name.

  Returns:
    The images, or None if the path can only hold record shards.

  Raises:
    ValueError: if the layout is unsupported or ambiguous, the split is unknown, or settings of the
      source do not apply to its path.
    OSError: if a file or folder cannot be read.
  """
  source, split, path = request.source, request.split, request.path
  check_image_root(source)
  if path is None:
    if any(map(_is_list, source.paths)):
      raise ValueError(
        f"path={source.path!r}: only shards can be combined; use a separate Source for each split "
        "file"
      )
    return None
  format, root = source.format, source.image_root
  if format not in ("auto", *layouts.FORMATS):
    raise ValueError(f"format={format!r}: expected 'auto' or one of {', '.join(layouts.FORMATS)}.")
  if fs.is_dir(path):
    found = _open_folder(path, split, root, format, source.follow_links)
    if found is None:
      return None
    root, listing, split = found
  elif format == "auto" and not _is_list(path) and not _is_metadata(path):
    return None
  else:
    if format == "auto":
      other = "coco" if path.endswith(".json") else "jsonl"
      format = "imagefolder" if _is_metadata(path) else other
    if root and not layouts.LAYOUTS[format].takes_images:
      raise ValueError(f"image_root={root!r}: format {format} stores its images in {path}.")
    root = root or jsonl.parent(path)
    listing = _read_list(request.collection, format)
  if listing.format == "classes":
    return _classes(source, root, listing, split)
  return _captions(source, root, listing, split)


def check_image_root(source: Source) -> None:
  """Raise ValueError if `image_root` is set for a path that is not a list of images."""
  if source.image_root is not None and not (
    any(map(_is_list, source.paths)) or (len(source.paths) == 1 and _holds_list(source))
  ):
    raise ValueError(
      f"image_root={source.image_root!r} requires a split file such as dataset_coco.json or "
      f"another list of images, and path={source.path!r} is not one; omit image_root"
    )


def _is_list(path: str) -> bool:
  return path.endswith((".json", ".jsonl"))


def _holds_list(source: Source) -> bool:
  """Return whether the path is a folder that contains captions.jsonl or labels.jsonl."""
  path = source.paths[0]
  if not fs.is_dir(path):
    return source.format in layouts.FORMATS and layouts.LAYOUTS[source.format].takes_images
  return any(fs.exists(fs.join(path, name)) for name in jsonl.LISTS)


def _open_folder(
  path: str, split: Split, image_root: str | None, format: str, follow_links: bool
) -> tuple[str, Listing, Split] | None:
  """Return the folder of the images, its items, and the split to select among them."""
  top = fs.listdir(path)
  has_list = any(name in jsonl.LISTS or name in METADATA for name in top)
  split_is_folder = bool(split.name) and split.name in top and not has_list
  root = fs.join(path, split.name) if split.name and split_is_folder else path
  if not fs.is_dir(root):
    return None
  if format == "auto" and any(map(is_shard, fs.listdir(root))):
    return None
  collection = Collection(root, image_root or "", follow_links)
  if format == "auto":
    guessed = _guess(collection)
    if guessed is None:
      return None
    format = guessed
  if not layouts.LAYOUTS[format].in_files:
    return None  # tars are shards
  if format == "classes":
    _check_classes(path, root, split, collection.tree)
  listing = layouts.LAYOUTS[format].read(collection)
  if split_is_folder:
    split = Split(None, split.slices)
  return image_root or root, listing, split


def _guess(collection: Collection) -> str | None:
  """Return the layout of a folder; None if it cannot contain images."""
  tree = collection.tree
  is_list = any(
    name in jsonl.LISTS or name in METADATA for n in tree.folders.values() for name in n
  )
  has_images = any(guess.is_image(name) for _, name in tree.files())
  has_tars = any(name.lower().endswith(".tar") for name in tree.folders[""])
  if not is_list and not has_images and not has_tars:
    if tree.outside and not any(map(is_shard, tree.folders[""])):
      name, target = next(iter(tree.outside.items()))
      raise ValueError(f"{collection.path}: {links.POINTS_OUTSIDE}: {links.describe(name, target)}")
    return None
  if has_images and has_tars and not is_list:
    return "classes"  # archives next to the folders extracted from them
  return guess.guess_format(collection, "format of a Source", strict=False)


def _read_list(collection: Collection, format: str) -> Listing:
  if format not in ("jsonl", "coco", "imagefolder"):
    raise ValueError(
      f"{collection.path}: format {format} is a folder of images, and this is a file."
    )
  if not fs.exists(collection.path):
    raise ValueError(f"{collection.path}: no such file.")
  return layouts.LAYOUTS[format].read(collection)


def _is_metadata(path: str) -> bool:
  return fs.basename(path) in METADATA


def _check_classes(path: str, root: str, split: Split, tree: Tree) -> None:
  """Raise ValueError if the subfolders are not classes, or the requested split does not exist.

  Args:
    path: path of the source.
    root: folder whose subfolders should be classes; equals `path` without a split.
    split: requested split.
    tree: files below `root`.
  """
  filled = tree.images_by_top
  splits, nested = classes.split_names(filled)
  missing = split.name if root == path else None
  if nested or (splits and splits == [*filled]):
    hint = f"split={missing!r} is not one of them" if missing else "choose one with split=..."
    raise ValueError(f"{root} holds the splits {', '.join(splits)}; {hint}")
  if missing:
    raise ValueError(
      f"{path} has no folder of split {missing!r}, but the class folders "
      f"{', '.join(tree.top[:8])}{' ...' if len(tree.top) > 8 else ''}; omit the split, or "
      "use a slice such as '[:90%]'"
    )
  if len(filled) == 1:
    raise UndefinedLayout(
      f"all images in {root} are in one folder, {', '.join(filled)}, which defines neither class "
      f"nor caption; {_EXPECTED}"
    )


def _classes(source: Source, root: str, listing: Listing, split: Split) -> ImageFiles:
  """Return the images of class folders with labels."""
  classes = listing.class_names or ()
  numbers = {name: number for number, name in enumerate(classes)}
  entries = sorted(
    (hashlib.blake2b(encode_text(item.key), digest_size=8).digest(), item.key, numbers[item.label])
    for item in listing.items
    if item.label is not None
  )
  kept = [entries[i] for i in split.range(len(entries))]
  _log_skips(root, listing)
  names, labels = [name for _, name, _ in kept], [label for _, _, label in kept]
  return ImageFiles(source, root, names, None, labels, classes, listing.skips)


def _captions(source: Source, root: str, listing: Listing, split: Split) -> ImageFiles:
  """Return the images of any other layout, with captions, labels or both."""
  path = source.paths[0]
  splits = [item.split or None for item in listing.items]
  items = [listing.items[i] for i in select_split(path, split, splits)]
  names = [item.key for item in items]
  check_some_exist(path, root, names, source.follow_links)
  _log_skips(path, listing)
  classes = sorted({item.label for item in listing.items if item.label is not None})
  numbers = {name: number for number, name in enumerate(classes)}
  if not any(item.captions for item in listing.items):
    source = dataclasses.replace(source, caption_keys=())
  captions = [item.captions for item in items]
  labels = [None if item.label is None else numbers[item.label] for item in items]
  return ImageFiles(source, root, names, captions, labels, tuple(classes) or None, listing.skips)


def _log_skips(path: str, listing: Listing) -> None:
  """Log inputs without a record and ignored files."""
  found: dict[str, list[str]] = {}
  path = fs.printable(path)
  for skip in listing.skips:
    found.setdefault(skip.reason, []).append(skip.key)
  for reason, keys in found.items():
    log.warning(
      "%s: skipped %d: %s; for example %s", path, len(keys), reason, text_rules.printable(keys[0])
    )
  if listing.notes.counts:
    log.info("%s: %s", path, listing.notes)
