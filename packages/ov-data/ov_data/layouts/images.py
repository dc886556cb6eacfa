"""The layout `images`: all images below a folder, without captions and labels.

photos/1.jpg
photos/2026/holiday/2.png

It is never detected, because most folders of images have captions or classes. Searching a
collection requires neither.
"""

from ov_data.layouts.classes import UNSUPPORTED, tree_notes, tree_skips
from ov_data.layouts.items import Blob, Collection, Item, Listing
from ov_data.layouts.tree import is_image, is_unsupported_image, join_names
from ov_data.record_source import Skip


class UndefinedLayout(ValueError):
  """A folder of images that has neither captions nor classes."""


def read(collection: Collection) -> Listing:
  """List the images of a folder and its subfolders, sorted by folder and name.

  Raises:
    OSError: if a folder cannot be listed.
  """
  tree = collection.tree
  items, skips, notes = [], tree_skips(tree), tree_notes(tree)
  for folder, name in tree.files():
    file = join_names(folder, name)
    if is_image(name):
      items.append(Item(file, Blob(tree.root, file)))
    elif is_unsupported_image(name):
      skips.append(Skip(file, UNSUPPORTED, "convert it to JPEG, PNG or WebP"))
    else:
      notes.add("files that are not images", file)
  return Listing("images", items, skips, notes)
