"""Images in files, read as if they were records: see image_files.py.

Nothing but names and captions is read until an image's turn comes. An image that is missing then
costs its row, as a broken record does.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import errno
import functools
import hashlib
import json
import os
from typing import Any

import numpy as np

from ov_data import example, fs, links
from ov_data.example import Feature
from ov_data.layouts import text_rules
from ov_data.record_source import Skip
from ov_data.records import MAX_RECORD_BYTES


class Pictures:
  """Files of pictures under one folder, numbered 0 to len - 1.

  root: the folder.
  names: of the files, relative to it, in their order.
  facts: what else is known of each picture, fit for JSON.
  features: those that follow from the facts.
  image_key: the feature for the bytes of the file.
  class_names: what labels mean, if there are any.
  skips: files that were found and are not used.
  follow_links: whether links are followed that lead out of the folder.
  """

  def __init__(
    self,
    root: str,
    names: Sequence[str],
    facts: Sequence[Any],
    features: Callable[[Any], Mapping[str, Any]],
    image_key: str,
    class_names: tuple[str, ...] | None = None,
    skips: Sequence[Skip] = (),
    follow_links: bool = False,
  ):
    self.class_names = class_names
    self.skips = skips
    self._root = root
    self._names = names
    self._facts = facts
    self._features = features
    self._image_key = image_key
    self._follow_links = follow_links

  def __len__(self) -> int:
    return len(self._names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits of the names in their order and of the facts, not of the pictures' bytes."""
    digest = hashlib.sha256()
    for name, fact in zip(self._names, self._facts):
      digest.update(json.dumps([name, fact]).encode())
    return digest.hexdigest()[:16]

  def locate(self, record: int) -> tuple[str, int]:
    """The file of a picture, and 0."""
    return fs.join(self._root, self._names[record]), 0

  def features(self, record: int, keys: Collection[str] | None = None) -> dict[str, Feature]:
    """Read a record; see `RecordSource.features`."""
    features = {"key": self._names[record], **self._features(self._facts[record])}
    if keys is None or self._image_key in keys:
      features[self._image_key] = self._bytes(record)
    return {
      key: _feature(encoded(value))
      for key, value in features.items()
      if keys is None or key in keys
    }

  def _bytes(self, record: int) -> bytes:
    path, _ = self.locate(record)
    name = self._names[record]
    if not self._follow_links and links.target_outside(self._root, name) and os.path.isfile(path):
      raise example.FeatureError(links.LEADS_OUT)
    try:
      return fs.read_regular(path, MAX_RECORD_BYTES)
    except FileNotFoundError:
      raise example.FeatureError("image file is missing") from None
    except OSError as error:
      if error.errno != errno.EFBIG:
        raise
      raise example.FeatureError("image file over 1 GiB") from None


def _feature(value: Any) -> Feature:
  """The value as `ov_data.example.parse` would return it."""
  if isinstance(value, int):
    return np.array([value], np.int64)
  return [value] if isinstance(value, bytes) else value


def encoded(value: Any) -> Any:
  """Return strings as bytes: names may hold what is no UTF-8, captions lone surrogates."""
  if isinstance(value, str):
    if not is_encodable(value):
      value = text_rules.repaired(value)
    return value.encode("utf-8", "surrogateescape")
  return [encoded(item) for item in value] if isinstance(value, list) else value


def is_encodable(text: str) -> bool:
  """Whether the text can be bytes again: all but lone surrogates that stand for no byte."""
  try:
    text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return False
  return True
