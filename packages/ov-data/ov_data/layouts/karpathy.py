"""The layout `karpathy`: split files of images with several captions each.

dataset_coco.json, dataset_flickr30k.json and dataset_flickr8k.json list the images of these data
sets with all sentences and the standard splits for retrieval and captioning.
Karpathy and Fei-Fei 2015, https://arxiv.org/abs/1412.2306:

    {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg",
                 "split": "test", "sentences": [{"raw": "A man on a bike.", ...}, ...]}, ...]}
"""

from collections.abc import Mapping
from typing import Any

from ov_data.layouts import text_rules
from ov_data.layouts.items import Blob, Collection, Item, Listing, Notes, clean_captions
from ov_data.layouts.jsonl import parent
from ov_data.record_source import Skip


def read(collection: Collection) -> Listing:
  """List the images in file order, each with all its sentences.

  Raises:
    ValueError: if the file is malformed; the message names the image.
    OSError: if the file cannot be read.
  """
  notes = Notes()
  items: list[Item] = []
  skips: list[Skip] = []
  seen: set[str] = set()
  root = collection.images or parent(collection.path)
  for (name, split, sentences), image in zip(entries(collection), collection.content["images"]):
    listed = image.get("sentences") or []
    if unused := (len(listed) if isinstance(listed, list) else 1) - len(sentences):
      notes.add("sentences without text", name, unused)
    if name in seen:
      skips.append(Skip(name, "repeated file name"))
      continue
    seen.add(name)
    try:
      captions = clean_captions(sentences, name, notes)
    except text_rules.TextError as error:
      skips.append(Skip(name, error.reason, error.detail))
      continue
    items.append(Item(name, Blob(root, name), captions, split=split or ""))
  return Listing("karpathy", items, skips, notes)


def entries(collection: Collection) -> list[tuple[str, str | None, list[str]]]:
  """Return name, split and sentences of every image; only invalid bytes in sentences are changed.

  Raises:
    ValueError: if the file is malformed, has another format, or names a file outside its folder.
    OSError: if the file cannot be read.
  """
  path, images = collection.path, collection.content["images"]
  if not images:
    raise ValueError(
      f'{path}: expected {{"images": [...]}} with at least one, as in dataset_coco.json'
    )
  return [
    (_image_name(path, number, image), _split(image), _sentences(image))
    for number, image in enumerate(images)
  ]


def _image_name(path: str, number: int, image: Any) -> str:
  """Return the relative name of an image; raise ValueError if it is outside the image folder."""
  if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
    raise ValueError(
      f'{path}: image {number} has no "filename"; expected a file of Karpathy\'s splits such as '
      "dataset_coco.json; COCO's own captions_*.json need image_root, the folder of their images"
    )
  folder, name = image.get("filepath"), image["filename"]
  if isinstance(folder, str) and folder:
    name = f"{folder[:-1] if folder.endswith('/') else folder}/{name}"
  if not {"", ".."}.isdisjoint(name.split("/")):
    raise ValueError(f"{path}: image {number} leaves the folder of images: {name[:200]!r}")
  if "\0" in name or not _is_file_name(name):
    raise ValueError(f"{path}: image {number} has a name that no file can have: {name[:200]!r}")
  return name


def _split(image: Mapping[str, Any]) -> str | None:
  split = image.get("split")
  return None if split is None else str(split)


def _sentences(image: Mapping[str, Any]) -> list[str]:
  """Return the valid captions; the loader counts images without captions."""
  sentences = image.get("sentences")
  raw = (
    [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else ()
  )
  return [text_rules.repaired_bytes(text) for text in raw if isinstance(text, str)]


def _is_file_name(name: str) -> bool:
  try:
    name.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return False
  return True
