"""Conversion of the items of an image collection to examples of record shards."""

from collections.abc import Iterator, Sequence
import dataclasses
import errno
import hashlib
import io
import json
import logging
import math
import os
from pathlib import Path
import pickle
import re

from PIL import Image

from ov_data import decode, links
from ov_data.layouts import Blob, Item, Listing, read_blob, text_rules
from ov_data.writer import Features, Skip

_KEPT_FORMATS = ("JPEG", "PNG", "WEBP")  # stored unchanged
_NOT_REGULAR = (errno.EINVAL, errno.EISDIR, errno.ENXIO)  # pipes and devices, folders, sockets
_UNEXPECTED = "unexpected error"
_MIN_FAILURES = 20  # if that many items all fail unexpectedly, there is a bug
HELD_OUT = "heldout"
TRAIN = "train"

log = logging.getLogger("ov_data")


@dataclasses.dataclass(frozen=True)
class Options:
  """Options for the conversion of each item."""

  max_side: int = 0  # downscale larger images to this; 0 keeps every size
  reencode: bool = False  # convert all images to JPEG, not only unsupported formats
  quality: int = 92  # quality of written JPEGs
  caption_template: str = ""  # caption from the label if there is none: "a photo of a {}"
  require_caption: bool = False  # skip items without caption
  follow_links: bool = False  # follow links that point outside the folder

  def __post_init__(self) -> None:
    if self.max_side < 0 or 0 < self.max_side < 16:
      raise ValueError(f"max_side={self.max_side}: expected 0 (keep), or at least 16 pixels.")
    if not 1 <= self.quality <= 100:
      raise ValueError(f"quality={self.quality}: expected 1 to 100.")
    if self.caption_template and not re.fullmatch(r"[^{}]*\{\}[^{}]*", self.caption_template):
      raise ValueError(
        f"caption_template={self.caption_template!r}: expected one {{}} and no other brace in it."
      )


@dataclasses.dataclass(frozen=True)
class ShardPlan:
  """Assignment of items to shards, stored in one file per shard for the workers.

  Attributes:
    folder: folder of the item lists.
    options: options of the conversion.
    classes: index of each label.
    shards: number of shards of each split.
    tars: size and modification time of each tar file when its members were listed.
  """

  folder: str
  options: Options
  classes: dict[str, int]
  shards: dict[str, int]
  tars: dict[str, tuple[int, int]]

  def __call__(self, split: str, number: int) -> Iterator[Features | Skip]:
    """Yield the examples of a shard (`make_shard` of `ov_data.writer`).

    Raises:
      ValueError: if a tar file changed since it was listed.
      RuntimeError: if all items fail with unexpected errors.
    """
    items, skips = pickle.loads(Path(self.folder, f"{split}-{number}").read_bytes())
    for path in {item.image.path for item in items if item.image.size is not None}:
      if _size_and_mtime(path) != self.tars[path]:
        raise ValueError(f"{path} changed during the conversion; repeat the command.")
    yield from map(_escaped, skips)
    failed = 0
    for count, item in enumerate(items, 1):
      result = _convert_item(item, self.options, self.classes)
      if isinstance(result, Skip):
        failed += result.reason == _UNEXPECTED
        result = _escaped(result)
      if failed == count and len(items) >= 3 and min(len(items), _MIN_FAILURES) <= count:
        raise RuntimeError(f"each of the first {count} images failed; the last error: {result}")
      yield result


def plan(
  listing: Listing, folder: str, options: Options, *, holdout: float, shard_bytes: int, seed: int
) -> ShardPlan:
  """Assign the items to splits and shards.

  Order and holdout depend only on a hash of (seed, key), not on the order of the input. New items
  do not move other items between splits.

  Args:
    listing: items to convert. Existing splits are kept.
    folder: folder for the item lists.
    options: options of the conversion.
    holdout: fraction of the items in the split "heldout"; the others are "train".
    shard_bytes: approximate size of a shard, before image conversion.
    seed: seed of the hash.

  Raises:
    ValueError: if holdout is not a fraction, or the input has splits.
  """
  check_holdout(holdout)
  splits: dict[str, list[Item]] = {}
  for item in _ranked(listing.items, seed):
    splits.setdefault(item.split or TRAIN, []).append(item)
  splits = {name: splits[name] for name in sorted(splits, key=lambda s: (s != TRAIN, s))}
  for name in splits:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
      raise ValueError(f"split {name!r}: expected letters, digits, _ and - only; rename it.")
  if holdout and splits.keys() - {TRAIN}:
    raise ValueError(
      f"holdout={holdout}: the input has the splits {', '.join(splits)} already; omit --holdout."
    )
  splits = splits or {TRAIN: []}
  if holdout:
    border = int(holdout * 2**64)
    ranked = splits[TRAIN]
    splits[TRAIN] = [item for item in ranked if _rank(seed, item.key) >= border]
    if held_out := ranked[: len(ranked) - len(splits[TRAIN])]:
      splits[HELD_OUT] = held_out
  shards: dict[str, int] = {}
  for split, items in splits.items():
    total = sum(_size(item.image) for item in items)
    shards[split] = max(1, min(math.ceil(total / shard_bytes), len(items)))
    for number in range(shards[split]):
      skips = listing.skips if split == next(iter(splits)) and number == 0 else []
      part = (items[number :: shards[split]], skips)
      Path(folder, f"{split}-{number}").write_bytes(pickle.dumps(part))
  classes = sorted({item.label for item in listing.items if item.label is not None})
  numbers = {label: number for number, label in enumerate(classes)}
  return ShardPlan(folder, options, numbers, shards, _tars(listing))


def check_holdout(holdout: float) -> None:
  """Raise ValueError if `holdout` is not a fraction."""
  if not 0 <= holdout < 1:
    raise ValueError(f"holdout={holdout}: expected a fraction from 0 to less than 1.")


def sample(listing: Listing, count: int, seed: int) -> Listing:
  """Return `count` items, sampled by a different hash than `plan` uses for the splits."""
  items = sorted(listing.items, key=lambda item: (_rank(seed, f"sample/{item.key}"), item.key))
  return dataclasses.replace(listing, items=items[:count])


def digest(listing: Listing) -> str:
  """Return 16 hex digits that identify the content of the records.

  The digest covers the content of keys, captions, labels and splits, size and modification time of
  image files, and for images in tars their header and size and modification time of the tar.
  """
  total = hashlib.sha256()
  tars = _tars(listing)
  for item in sorted(listing.items, key=lambda item: item.key):
    image = item.image
    stamp = _size_and_mtime(image.path) if image.size is None else tars[image.path]
    place = (image.offset, image.size, image.checksum, *stamp)
    facts = (item.key, item.captions, item.label, item.split, place)
    total.update(json.dumps(facts).encode())
  return total.hexdigest()[:16]


def _tars(listing: Listing) -> dict[str, tuple[int, int]]:
  """Return size and modification time of each tar."""
  paths = {item.image.path for item in listing.items if item.image.size is not None}
  return {path: _size_and_mtime(path) for path in paths}


def _size_and_mtime(path: str) -> tuple[int, int]:
  """Return size and modification time in nanoseconds, or zeros for a missing file."""
  try:
    status = os.stat(path)
  except (OSError, ValueError):  # counted when the item is read
    return 0, 0
  return status.st_size, status.st_mtime_ns


def _ranked(items: list[Item], seed: int) -> list[Item]:
  return sorted(items, key=lambda item: (_rank(seed, item.key), item.key))


def _rank(seed: int, key: str) -> int:
  data = f"{seed}/{key}".encode("utf-8", "surrogateescape")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _size(blob: Blob) -> int:
  return _size_and_mtime(blob.path)[0] if blob.size is None else blob.size


def _escaped(skip: Skip) -> Skip:
  return Skip(text_rules.printable(skip.key), skip.reason, text_rules.printable(skip.detail))


_logged: set[type[Exception]] = set()  # error types already logged by this process


def _convert_item(item: Item, options: Options, classes: dict[str, int]) -> Features | Skip:
  """Return the example of an item, or a skip for any error."""
  try:
    return _example(item, options, classes)
  except MemoryError:
    raise
  except Exception as error:
    if type(error) not in _logged:
      _logged.add(type(error))
      log.exception("%s: %s", _UNEXPECTED, text_rules.printable(item.key))
    return Skip(item.key, _UNEXPECTED, f"{type(error).__name__}: {error}")


def _example(item: Item, options: Options, classes: dict[str, int]) -> Features | Skip:
  captions = item.captions
  if not captions and item.label is not None and options.caption_template:
    captions = (options.caption_template.format(item.label),)
  if not captions and (item.label is None or options.require_caption):
    return Skip(item.key, "no caption")
  try:
    data, width, height = _image(item.image, options)
  except FileNotFoundError:
    return Skip(item.key, "missing image", item.image.path)
  except links.LinkError as error:
    return Skip(item.key, links.POINTS_OUTSIDE, str(error))
  except OSError as error:
    what = "not a regular file" if error.errno in _NOT_REGULAR else "unreadable file"
    return Skip(item.key, what, str(error))
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


def _image(blob: Blob, options: Options) -> tuple[bytes, int, int]:
  """Decode an image; return the bytes to store, and width and height as displayed."""
  limits = decode.DEFAULT_LIMITS
  data = read_blob(blob, limits.max_bytes + 1, options.follow_links)
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
  with Image.open(io.BytesIO(data), formats=decode.FORMATS) as image:
    return image.format
