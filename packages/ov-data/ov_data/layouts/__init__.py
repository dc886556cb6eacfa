"""Readers for layouts of image collections, used by the loader and the converter."""

from collections.abc import Callable
import dataclasses

from ov_data import fs
from ov_data.layouts import (
  classes,
  coco,
  imagefolder,
  images,
  img2dataset,
  jsonl,
  karpathy,
  text_rules,
  webdataset,
)
from ov_data.layouts.guess import guess_format
from ov_data.layouts.items import Blob, Collection, Item, Listing, Notes, read_blob


@dataclasses.dataclass(frozen=True)
class Layout:
  """A layout of image collections.

  Attributes:
    read: function that lists the items.
    takes_images: whether it is a list that may name images in another folder.
    in_files: whether every image is a file, which the loader requires.
  """

  read: Callable[[Collection], Listing]
  takes_images: bool = False
  in_files: bool = True


LAYOUTS = {
  "jsonl": Layout(jsonl.read, takes_images=True),
  "imagefolder": Layout(imagefolder.read),
  "img2dataset": Layout(img2dataset.read),
  "classes": Layout(classes.read),
  "coco": Layout(coco.read, takes_images=True),
  "karpathy": Layout(karpathy.read, takes_images=True),
  "webdataset": Layout(webdataset.read, in_files=False),
  "images": Layout(images.read),
}
FORMATS = tuple(LAYOUTS)


def read(path: str, format: str = "auto", images: str = "", follow_links: bool = False) -> Listing:
  """List the items of a collection.

  Args:
    path: folder, .jsonl or .json file, tar file, or a glob or {000..099} range of tars.
    format: one of FORMATS, or "auto".
    images: folder of the images of a list; "" is the folder of the list.
    follow_links: whether to follow links that point outside the folder, see `ov_data.links`.

  Returns:
    The items and skips, at least one of both.

  Raises:
    ValueError: if the layout is ambiguous or unknown, a list is malformed (the message has file and
      line), or no image was found.
    OSError: if a file or folder cannot be read.
  """
  if format not in ("auto", *FORMATS):
    raise ValueError(f"format={format!r}: expected auto or one of {', '.join(FORMATS)}.")
  if images and not fs.is_dir(images):
    raise ValueError(f"--images={images}: no such folder.")
  collection = Collection(path, images, follow_links)
  if format == "auto":
    format = guess_format(collection, f"--format={'|'.join(FORMATS)}")
  layout = LAYOUTS[format]
  if images and not layout.takes_images:
    raise ValueError(f"--images={images}: format {format} has its images in {path}; omit --images.")
  if format in ("classes", "images", "img2dataset", "imagefolder") and not fs.is_dir(path):
    if format != "imagefolder" or not fs.exists(path):
      what = "not a folder" if fs.exists(path) else "no such folder"
      raise ValueError(f"{path}: {what}; format {format} is a folder of images.")
  listing = layout.read(collection)
  if not listing.items and not listing.skips:
    raise ValueError(f"{path}: no images found (read as {format}).")
  return listing


def describe(path: str, listing: Listing) -> str:
  """Return a one-line summary of a listing with counts and an example."""
  items = listing.items
  text = f"reading {path} as {listing.format}: {len(items):,} images"
  with_captions = sum(bool(item.captions) for item in items)
  if with_captions or listing.format != "classes":
    text += f", {with_captions:,} with captions"
  labels = {item.label for item in items if item.label is not None}
  if labels:
    text += (
      f", {sum(item.label is not None for item in items):,} with one of {len(labels):,} labels"
    )
  splits = dict.fromkeys(item.split for item in items if item.split)
  if splits:
    text += f", splits {', '.join(splits)}"
  if items:
    item = next((item for item in items if item.captions), items[0])
    value = item.captions[0] if item.captions else item.label
    text += f"; for example {item.key if len(item.key) < 200 else item.key[:200] + '...'}"
    text += "" if value is None else f': "{value[:80]}"'
  return text_rules.printable(text)


__all__ = [
  "FORMATS",
  "LAYOUTS",
  "Blob",
  "Item",
  "Layout",
  "Listing",
  "Notes",
  "Place",
  "describe",
  "guess_format",
  "read",
  "read_blob",
]
