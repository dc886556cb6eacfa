"""The layout `karpathy`: split files that name images with several captions each.

dataset_coco.json, dataset_flickr30k.json and dataset_flickr8k.json name the images of these data
sets, all sentences of each, and the splits in which retrieval and captioning are reported.
Karpathy and Fei-Fei 2015, https://arxiv.org/abs/1412.2306:

    {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg",
                 "split": "test", "sentences": [{"raw": "A man on a bike.", ...}, ...]}, ...]}
"""

from collections.abc import Mapping
from typing import Any

from ov_data.layouts import text_rules
from ov_data.layouts.items import Blob, Item, Listing, Notes, Place, clean_captions
from ov_data.layouts.jsonl import parent
from ov_data.record_source import Skip


def read(place: Place) -> Listing:
  """List the images of the file in its order, each with all its sentences.

  Raises:
    ValueError: the file is malformed; names the image.
    OSError: it cannot be read.
  """
  notes = Notes()
  items: list[Item] = []
  skips: list[Skip] = []
  seen: set[str] = set()
  root = place.images or parent(place.path)
  for (name, split, sentences), image in zip(entries(place), place.content["images"]):
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


def entries(place: Place) -> list[tuple[str, str | None, list[str]]]:
  """Return name, split and sentences of every image, sentences as written but for invalid bytes.

  Raises:
    ValueError: the file is malformed, of another kind, or names a file outside of its folder.
    OSError: it cannot be read.
  """
  path, images = place.path, place.content["images"]
  if not images:
    raise ValueError(
      f'{path}: expected {{"images": [...]}} with at least one, as in dataset_coco.json'
    )
  return [
    (_image_name(path, number, image), _split(image), _sentences(image))
    for number, image in enumerate(images)
  ]


def _image_name(path: str, number: int, image: Any) -> str:
  """Return the image's name below the folder of images; ValueError where it would lead out."""
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
  """Return the captions; what is none is left out, and the loader counts who has none."""
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
