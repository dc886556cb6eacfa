"""The layout `classes`: class folders, whose names are the labels.

photos/dog/1.jpg             or, with split folders, photos/train/dog/1.jpg
photos/cat/deep/2.png
"""

from collections.abc import Mapping, Sequence

from ov_data import links
from ov_data.layouts import text_rules
from ov_data.layouts.items import Blob, Collection, Item, Listing, Notes
from ov_data.layouts.tree import SPLIT, Tree, is_image, is_unsupported_image, join_names
from ov_data.record_source import Skip

UNSUPPORTED = "unsupported image type"
_UNSORTED = "image in no class folder"


def read(collection: Collection) -> Listing:
  """List the images in class folders.

  Folders named like splits are splits, not classes, if they contain class folders and either there
  are several of them or no other folder contains images.

  Raises:
    OSError: if a folder cannot be listed.
  """
  tree = collection.tree
  skips = tree_skips(tree)
  notes = tree_notes(tree)
  splits = split_folders(tree)
  found: list[tuple[str, str, list[str]]] = []  # split, class folder, images
  for folder in sorted(tree.folders):
    images = []
    for name in tree.folders[folder]:
      if is_image(name):
        images.append(join_names(folder, name))
      elif is_unsupported_image(name):
        remedy = "convert it to JPEG, PNG or WebP"
        skips.append(Skip(join_names(folder, name), UNSUPPORTED, remedy))
      else:
        notes.add("files that are not images", join_names(folder, name))
    split, _, below = folder.partition("/") if splits else ("", "", folder)
    class_folder = below.partition("/")[0]
    if class_folder and (not splits or split in splits):
      found.append((split, class_folder, images))
    else:
      skips += [Skip(file, _UNSORTED) for file in images]
  folders = _class_folders(tree, splits)
  labels = {folder: text_rules.label_text(folder) for folder in folders}
  first = {label: folder for folder, label in reversed(labels.items())}
  for folder, label in labels.items():
    if label and first[label] != folder:
      notes.add("folders merged with another one of the same label", folder)
  items = []
  for split, folder, images in found:
    if label := labels[folder]:
      items += [Item(file, Blob(tree.root, file), label=label, split=split) for file in images]
    else:
      skips += [Skip(file, "empty label") for file in images]
  names = tuple(dict.fromkeys(filter(None, (labels[folder] for folder in folders))))
  return Listing("classes", items, skips, notes, names)


def tree_notes(tree: Tree) -> Notes:
  """Return the notes on ignored files and links."""
  notes = Notes()
  for name in tree.hidden:
    notes.add("hidden files and folders", name)
  for name in tree.links:
    notes.add("links to folders that were not followed", name)
  return notes


def tree_skips(tree: Tree) -> list[Skip]:
  """Return the links to folders outside the root, which are not read."""
  return [
    Skip(name, links.POINTS_OUTSIDE, links.describe(name, target))
    for name, target in tree.outside.items()
  ]


def split_names(filled: Mapping[str, Sequence[str]]) -> tuple[list[str], bool]:
  """Return the folders named like splits, and whether any of them has subfolders with images."""
  splits = [name for name in filled if SPLIT.fullmatch(name.lower())]
  return splits, any("/" in below for name in splits for below in filled[name])


def split_folders(tree: Tree) -> frozenset[str]:
  """Return the folders that are splits, not classes."""
  filled = tree.images_by_top
  splits, nested = split_names(filled)
  is_split = nested and (len(splits) > 1 or len(splits) == len(filled))
  return frozenset(splits if is_split else ())


def _class_folders(tree: Tree, splits: frozenset[str]) -> list[str]:
  """Return the sorted names of the class folders of all splits, including empty ones."""
  if not splits:
    return tree.top
  pairs = (folder.split("/") for folder in tree.folders if folder.count("/") == 1)
  return sorted({name for split, name in pairs if split in splits})
