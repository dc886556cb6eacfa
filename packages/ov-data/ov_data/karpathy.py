"""Karpathy's split files as a source of pictures with several captions each.

dataset_coco.json, dataset_flickr30k.json and dataset_flickr8k.json name the pictures of these data
sets, all sentences of each, and the splits in which retrieval and captioning are reported. They go
back to Karpathy and Fei-Fei 2015, https://arxiv.org/abs/1412.2306:

    {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg",
                 "split": "test", "sentences": [{"raw": "A man on a bike.", ...}, ...]}, ...]}
"""

from collections.abc import Mapping, Sequence
import errno
import json
from typing import Any

from ov_data import fs
from ov_data.pictures import Pictures, is_encodable
from ov_data.splits import Split

_PROBES = 16  # pictures looked for before the first is read
_MAX_BYTES = 1 << 30  # of a split file; COCO's has 0.14 GB


def open_split_file(
  path: str, root: str, split: Split, image_key: str, caption_keys: Sequence[str]
) -> Pictures:
  """The pictures of a split in one of Karpathy's files, in its order, each with all its sentences.

  Args:
    path: for instance dataset_coco.json.
    root: the folder of the pictures; for COCO the one that holds train2014 and val2014.
    split: "train", "val", "test", "restval", or several as in "train+restval"; None for all.
    image_key, caption_keys: features for the picture, and for its sentences.

  Raises:
    ValueError: the file is missing, broken or of another kind, has no such split, or none of the
      pictures looked for is there.
  """
  images = _read_split_file(path)
  names = [_picture_name(path, number, image) for number, image in enumerate(images)]
  kept = list(range(len(images)))
  if split.name:
    known = dict.fromkeys(str(image.get("split")) for image in images)
    wanted = split.name.split("+")
    if unknown := [name for name in wanted if name not in known]:
      raise ValueError(f"{path} has the splits {', '.join(known)}; split={unknown[0]!r} is not one")
    kept = [i for i in kept if images[i].get("split") in wanted]
  kept = [kept[i] for i in split.range(len(kept))]
  names = [names[i] for i in kept]
  probes = [fs.join(root, names[i]) for i in range(0, len(names), len(names) // _PROBES + 1)]
  if probes and not any(map(fs.exists, probes)):
    raise ValueError(
      f"none of {len(probes)} pictures of {path} is there, for instance {probes[0]}; set "
      f"image_root to the folder that holds {names[0].partition('/')[0]}"
    )
  sentences = [_sentences(images[i]) for i in kept]
  return Pictures(root, names, sentences, lambda s: dict.fromkeys(caption_keys, s), image_key)


def _read_split_file(path: str) -> list[dict[str, Any]]:
  try:
    text = fs.read_regular(path, _MAX_BYTES).decode("utf-8-sig", "replace")
    content = json.loads(text, object_hook=_without_tokens)
  except FileNotFoundError:
    raise ValueError(f"no split file at {path}: no such file") from None
  except OSError as error:
    if error.errno != errno.EFBIG:
      raise
    raise ValueError(f"{path}: over 1 GiB, which no split file has") from None
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}, line {error.lineno} column {error.colno}: not JSON ({error.msg}); is the file "
      "whole?"
    ) from None
  except ValueError as error:  # a number of thousands of digits
    raise ValueError(f"{path}: not a split file ({error})") from None
  except RecursionError:
    raise ValueError(f"{path}: not a split file, its JSON is nested too deeply") from None
  images = content.get("images") if isinstance(content, dict) else None
  if not isinstance(images, list) or not images:
    raise ValueError(
      f'{path}: expected {{"images": [...]}} with at least one, as in dataset_coco.json'
    )
  return images


def _without_tokens(value: dict[str, Any]) -> dict[str, Any]:
  """Drops the words of each sentence while the file is read: most of its memory, and unused."""
  value.pop("tokens", None)
  return value


def _picture_name(path: str, number: int, image: Any) -> str:
  """The picture's name below the folder of pictures; ValueError where it would lead out of it."""
  if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
    raise ValueError(
      f'{path}: image {number} has no "filename"; expected a file of Karpathy\'s splits such as '
      "dataset_coco.json, not COCO's own captions_*.json"
    )
  folder, name = image.get("filepath"), image["filename"]
  if isinstance(folder, str) and folder:
    name = f"{folder[:-1] if folder.endswith('/') else folder}/{name}"
  if not {"", ".."}.isdisjoint(name.split("/")):
    raise ValueError(f"{path}: image {number} leaves the folder of pictures: {name[:200]!r}")
  if "\0" in name or not is_encodable(name):
    raise ValueError(f"{path}: image {number} has a name that no file can have: {name[:200]!r}")
  return name


def _sentences(image: Mapping[str, Any]) -> list[str]:
  """The captions as they were written; what is none is left out, the loader counts who has none."""
  sentences = image.get("sentences")
  raw = (
    [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else ()
  )
  return [text for text in raw if isinstance(text, str)]
