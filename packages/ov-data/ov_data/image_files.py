"""Record source over image files, one record per file.

Images are read on access. A missing image is a bad record.
"""

from collections.abc import Collection, Sequence
import errno
import functools
import hashlib
import json
import os

import numpy as np

from ov_data import fs, links
from ov_data.example import Feature, FeatureError
from ov_data.layouts import text_rules
from ov_data.record_source import Record, RecordSource, Skip
from ov_data.records import MAX_RECORD_BYTES
from ov_data.request import Source
from ov_data.splits import Split

_PROBES = 16  # images whose existence is checked on opening


class ImageFiles(RecordSource):
  """Image files under one folder, numbered 0 to len - 1.

  Args:
    source: configuration with the feature keys and the link policy.
    root: folder that contains the images.
    names: file names relative to `root`, in record order.
    captions: captions of each image; None if the format has no captions.
    labels: class index of each image or None; None if the format has no labels.
    class_names: names of the classes.
    skips: unused files.
  """

  def __init__(
    self,
    source: Source,
    root: str,
    names: Sequence[str],
    captions: Sequence[Sequence[str]] | None,
    labels: Sequence[int | None] | None = None,
    class_names: tuple[str, ...] | None = None,
    skips: Sequence[Skip] = (),
  ):
    self.class_names = class_names
    self.skips = skips
    self._source = source
    self._root = root
    self._names = names
    self._captions = captions
    self._labels = labels

  def __len__(self) -> int:
    return len(self._names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Return 16 hex digits of the ordered names, captions and labels, not of the image bytes."""
    digest = hashlib.sha256()
    for record, name in enumerate(self._names):
      known = [values[record] for values in (self._captions, self._labels) if values is not None]
      digest.update(json.dumps([name, known if len(known) > 1 else known[0]]).encode())
    return digest.hexdigest()[:16]

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file of an image and the offset 0."""
    return fs.join(self._root, self._names[record]), 0

  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a record; see `RecordSource.read`."""
    image_key = self._source.image_key
    values: dict[str, Sequence[str] | int] = {"key": [self._names[record]]}
    if self._captions is not None:
      values |= dict.fromkeys(self._source.caption_keys, self._captions[record])
    label = None if self._labels is None else self._labels[record]
    if label is not None and self.class_names:
      values |= {"label": label, "class": [self.class_names[label]]}
    features: dict[str, Feature] = {
      key: np.array([value], np.int64) if isinstance(value, int) else [*map(encode_text, value)]
      for key, value in values.items()
      if key != image_key and (keys is None or key in keys)
    }
    if keys is None or image_key in keys:
      features[image_key] = [self._bytes(record)]
    return Record.of(features, image_key)

  def _bytes(self, record: int) -> bytes:
    path, _ = self.locate(record)
    name = self._names[record]
    outside = not self._source.follow_links and links.target_outside(self._root, name)
    if outside and os.path.isfile(path):
      raise FeatureError(links.POINTS_OUTSIDE)
    try:
      return fs.read_regular(path, MAX_RECORD_BYTES)
    except FileNotFoundError:
      raise FeatureError("image file is missing") from None
    except OSError as error:
      if error.errno != errno.EFBIG:
        raise
      raise FeatureError("image file over 1 GiB") from None


def encode_text(text: str) -> bytes:
  """Encode a text as bytes; supports names that are not UTF-8 and lone surrogates in captions."""
  try:
    return text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return text_rules.repaired(text).encode("utf-8", "surrogateescape")


def select_split(path: str, split: Split, splits: Sequence[str | None]) -> list[int]:
  """Return the indices of the images in `split`; `splits` holds the split of each image."""
  kept = list(range(len(splits)))
  if split.name:
    known = dict.fromkeys(map(str, splits))
    wanted = split.name.split("+")
    if not any(splits):
      raise ValueError(
        f"{path} has no splits, and split={split.name!r} names one; omit it, or use a slice "
        "such as '[:90%]'"
      )
    if unknown := [name for name in wanted if name not in known]:
      raise ValueError(f"{path} has the splits {', '.join(known)}; split={unknown[0]!r} is not one")
    kept = [i for i in kept if splits[i] in wanted]
  return [kept[i] for i in split.range(len(kept))]


def check_some_exist(path: str, root: str, names: Sequence[str], follow_links: bool) -> None:
  """Raise ValueError if none of a few evenly spaced images of a list can be read."""
  some = [names[i] for i in range(0, len(names), len(names) // _PROBES + 1)]
  outside = {name: links.target_outside(root, name) for name in some if not follow_links}
  if some and all(map(outside.get, some)):
    name = some[0]
    raise ValueError(
      f"{path}: all images are links that point outside {root}, for example "
      f"{links.describe(name, outside[name] or '')}"
    )
  probes = [fs.join(root, name) for name in some]
  if probes and not any(map(fs.exists, probes)):
    raise ValueError(
      f"none of {len(probes)} images of {path} exists, for instance {probes[0]}; set "
      f"image_root to the folder that holds {names[0].partition('/')[0]}"
    )
