"""The layout `coco`: captions_*.json of COCO with a folder of images."""

from typing import Any

from ov_data.layouts import text_rules
from ov_data.layouts.items import Collection, Listing
from ov_data.layouts.jsonl import MergedRows
from ov_data.record_source import Skip


def read(collection: Collection) -> Listing:
  """List the images of the file with their captions.

  Raises:
    ValueError: if the file is malformed (the message names the entry), or no folder of images is
      given.
    OSError: if the file cannot be read.
  """
  path = collection.path
  if not collection.images:
    raise ValueError(
      f"{path}: COCO lists require the folder of their images: --images=FOLDER "
      "(image_root of a Source)."
    )
  content = collection.content
  captions = _captions(path, content.get("annotations"))
  rows = MergedRows("entries merged with an earlier one of the same file")
  skips: list[Skip] = []
  seen: set[int | str] = set()
  for i, image in enumerate(content["images"]):
    where = f"{path}: images[{i}]"
    name = image.get("file_name") if isinstance(image, dict) else None
    if not isinstance(name, str) or not name or "id" not in image:
      raise ValueError(f"{where} has no id or file_name.")
    number = _id(image["id"], f"{where} has the id")
    if number in seen:
      skips.append(Skip(name, "repeated image id", f"{where}: {number!r}"))
      continue
    seen.add(number)
    rows.add(name, captions.pop(number, []), None, where)
  items, refused = rows.items(collection.images)
  skips += refused
  skips += [Skip(f"image_id {i}", "caption without image") for i in captions]
  return Listing("coco", items, skips, rows.notes)


def _captions(path: str, annotations: Any) -> dict[int | str, list[str]]:
  """Return the captions by image id."""
  if annotations is None:
    annotations = []
  if not isinstance(annotations, list):
    raise ValueError(
      f'{path}: expected "annotations": [...], found {text_rules.short(annotations)}.'
    )
  captions: dict[int | str, list[str]] = {}
  for i, annotation in enumerate(annotations):
    if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
      raise ValueError(
        f"{path}: annotations[{i}] has no caption (a list of instances?); "
        "use the captions_*.json of COCO."
      )
    number = _id(annotation.get("image_id"), f"{path}: annotations[{i}] has the image_id")
    captions.setdefault(number, []).append(annotation["caption"])
  return captions


def _id(value: Any, what: str) -> int | str:
  if isinstance(value, bool) or not isinstance(value, int | str):
    raise ValueError(f"{what} {text_rules.short(value)}; expected an integer or a string.")
  return value
