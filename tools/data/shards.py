"""From items to the examples of shards: who goes where, and what is written of each."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import io
import json
import math
import os
from pathlib import Path
import pickle

from PIL import Image

from ov_data import decode
from ov_data.writer import Features, Skip
from tools.data.inputs import Blob, Inputs, Item, read_blob

_KEPT_FORMATS = ("JPEG", "PNG", "WEBP")  # stored as they are
_MAX_TEXT_BYTES = 1 << 20
HELD_OUT = "heldout"


@dataclasses.dataclass(frozen=True)
class Options:
  """What is done to each item."""

  max_side: int = 0  # larger pictures are made smaller; 0 keeps every size
  reencode: bool = False  # every picture becomes a JPEG; else only those that have to
  quality: int = 92  # of JPEGs written here
  caption_template: str = ""  # makes a caption of the label where there is none: "a photo of a {}"
  require_caption: bool = False  # leave out what has no caption

  def __post_init__(self) -> None:
    if self.max_side < 0 or 0 < self.max_side < 16:
      raise ValueError(f"max_side={self.max_side}: expected 0 (keep), or at least 16 pixels.")
    if not 1 <= self.quality <= 100:
      raise ValueError(f"quality={self.quality}: expected 1 to 100.")
    if self.caption_template and self.caption_template.count("{}") != 1:
      raise ValueError(f"caption_template={self.caption_template!r}: expected one {{}} in it.")


@dataclasses.dataclass(frozen=True)
class Plan:
  """The items of every shard, in a folder of one file each: workers read what they make."""

  folder: str
  options: Options
  classes: dict[str, int]  # label -> number
  shards: dict[str, int]  # split -> number of shards

  def __call__(self, split: str, number: int) -> Iterator[Features | Skip]:
    """The examples of a shard (what `ov_data.writer` calls make_shard)."""
    items, skips = pickle.loads(Path(self.folder, f"{split}-{number}").read_bytes())
    yield from skips
    for item in items:
      yield _example(item, self.options, self.classes)


def plan(
  inputs: Inputs, folder: str, options: Options, *, holdout: float, shard_bytes: int, seed: int
) -> Plan:
  """Deals the items to splits and shards.

  Split and order follow from a hash of (seed, key) alone: they do not depend on the order of the
  input, and adding items moves none from one split to the other.

  Args:
    inputs: what to convert.
    folder: for the lists of the shards.
    options: see there.
    holdout: share of the items in the split "heldout"; the others are "train".
    shard_bytes: about the size of a shard, before any change of the pictures.
    seed: of the hash.

  Raises:
    ValueError: holdout is no share.
  """
  if not 0 <= holdout < 1:
    raise ValueError(f"holdout={holdout}: expected a share from 0 to less than 1.")
  border = int(holdout * 2**64)
  ranked = _ranked(inputs.items, seed)
  splits = {"train": [item for item in ranked if _rank(seed, item.key) >= border]}
  if held_out := ranked[: len(ranked) - len(splits["train"])]:
    splits[HELD_OUT] = held_out
  shards: dict[str, int] = {}
  for split, items in splits.items():
    total = sum(_size(item.image) for item in items)
    shards[split] = max(1, min(math.ceil(total / shard_bytes), len(items)))
    for number in range(shards[split]):
      skips = inputs.skips if split == "train" and number == 0 else []
      part = (items[number :: shards[split]], skips)
      Path(folder, f"{split}-{number}").write_bytes(pickle.dumps(part))
  classes = sorted({item.label for item in inputs.items if item.label is not None})
  return Plan(folder, options, {label: i for i, label in enumerate(classes)}, shards)


def sample(inputs: Inputs, count: int, seed: int) -> Inputs:
  """`count` of the items, by the same hash as in `plan`."""
  return dataclasses.replace(inputs, items=_ranked(inputs.items, seed)[:count])


def digest(inputs: Inputs) -> str:
  """Changes with the items: their keys, captions, labels and sizes; not with where they lie."""
  total = hashlib.sha256()
  for item in sorted(inputs.items, key=lambda item: item.key):
    facts = (item.key, item.captions, item.label, _size(item.image))
    total.update(json.dumps(facts).encode())
  return total.hexdigest()[:16]


def _ranked(items: list[Item], seed: int) -> list[Item]:
  return sorted(items, key=lambda item: (_rank(seed, item.key), item.key))


def _rank(seed: int, key: str) -> int:
  data = f"{seed}/{key}".encode("utf-8", "surrogateescape")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _size(blob: Blob) -> int:
  if blob.size is not None:
    return blob.size
  try:
    return os.path.getsize(blob.path)
  except OSError:  # told when its turn comes
    return 0


def _example(item: Item, options: Options, classes: dict[str, int]) -> Features | Skip:
  try:
    captions = _captions(item)
  except ValueError as error:
    return Skip(item.key, "unreadable caption", str(error))
  if not captions and item.label is not None and options.caption_template:
    captions = (options.caption_template.format(item.label),)
  if not captions and (item.label is None or options.require_caption):
    return Skip(item.key, "no caption")
  try:
    data, width, height = _image(item.image, options)
  except FileNotFoundError:
    return Skip(item.key, "missing image", item.image.path)
  except OSError as error:
    return Skip(item.key, "unreadable file", str(error))
  except decode.DecodeError as error:
    return Skip(item.key, error.reason, str(error))
  features: dict[str, bytes | str | int | Sequence[str]] = {
    "jpg": data,
    "key": item.key.encode("utf-8", "surrogateescape"),
    "width": width,
    "height": height,
  }
  if captions:
    features["txt"] = captions
  if item.label is not None:
    features |= {"label": item.label, "label_id": classes[item.label]}
  return features


def _captions(item: Item) -> tuple[str, ...]:
  captions = list(item.captions)
  if item.text is not None:
    captions.append(read_blob(item.text, _MAX_TEXT_BYTES).decode("utf-8").strip())
  elif item.meta is not None:
    meta = json.loads(read_blob(item.meta, _MAX_TEXT_BYTES))
    found = meta.get("captions", meta.get("caption", [])) if isinstance(meta, dict) else None
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
      raise ValueError(f"expected a caption in the JSON, found {str(found)[:60]}")
    captions += [text.strip() for text in found]
  return tuple(dict.fromkeys(text for text in captions if text))


def _image(blob: Blob, options: Options) -> tuple[bytes, int, int]:
  """The bytes to store, after a complete decode, with width and height as a viewer sees them."""
  limits = decode.DEFAULT_LIMITS
  data = read_blob(blob, limits.max_bytes + 1)
  image = decode.full(data, limits)
  large = options.max_side and max(image.size) > options.max_side
  if large or options.reencode or _format(data) not in _KEPT_FORMATS:
    if large:
      image.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.quality)
    data = buffer.getvalue()
  return data, image.width, image.height


def _format(data: bytes) -> str | None:
  with Image.open(io.BytesIO(data)) as image:
    return image.format
