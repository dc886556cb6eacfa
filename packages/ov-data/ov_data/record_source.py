"""Interface of a data format: random access to records by index.

Every format (TFRecord shards, image folders, split files) implements `RecordSource`, which is all
that the loader uses.
"""

import abc
from collections.abc import Collection, Mapping, Sequence
import dataclasses
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ov_data.example import Feature
from ov_data.index import ShardIndex


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
  """An input that does not produce a record.

  Attributes:
    key: name or position, such as "photos/1.heic" or "a.tfrecord at byte 120".
    reason: short phrase by which skips are counted.
    detail: additional information about the cause.
  """

  key: str
  reason: str
  detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """An encoded image with its features.

  Attributes:
    image: bytes of the image file; None if the record has no image or it was not requested.
    texts: bytes features by name, with one or several values each, such as captions and file
      names. For formats with named features this includes the image.
    labels: integer features by name, int64 [n].
    extra: float features by name, float32 [n].
  """

  image: bytes | None
  texts: Mapping[str, list[bytes]]
  labels: Mapping[str, NDArray[np.int64]]
  extra: Mapping[str, NDArray[np.float32]]

  @classmethod
  def of(cls, features: Mapping[str, Feature], image_key: str) -> Self:
    """Return a record from named features, with the image under `image_key`."""
    texts: dict[str, list[bytes]] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    extra: dict[str, NDArray[np.float32]] = {}
    for name, value in features.items():
      if isinstance(value, list):
        texts[name] = value
      else:
        (labels if value.dtype.kind == "i" else extra)[name] = value
    images = texts.get(image_key)
    return cls(images[0] if images else None, texts, labels, extra)

  def features(self, image_key: str) -> dict[str, Feature]:
    """Return all features by name, with the image under `image_key`."""
    image = {} if self.image is None else {image_key: [self.image]}
    return {**image, **self.texts, **self.labels, **self.extra}


class RecordSource(Protocol):
  """Records 0 to len - 1 with thread-safe random access.

  Attributes:
    class_names: class names indexed by the feature "label"; None without such labels.
    skips: inputs that do not produce a record.
    indexes: indexes of the shards, if the format has shards.
    unit: what the offset of `locate` counts: "byte" or "record".
  """

  class_names: tuple[str, ...] | None = None
  skips: Sequence[Skip] = ()
  indexes: Sequence[ShardIndex] = ()
  unit: str = "byte"

  @property
  @abc.abstractmethod
  def fingerprint(self) -> str:
    """16 hex digits that depend on the content, not on its location."""

  @abc.abstractmethod
  def __len__(self) -> int:
    """Return the number of records."""

  @abc.abstractmethod
  def locate(self, record: int) -> tuple[str, int]:
    """Return the file of a record and its offset in the file, in `unit`s."""

  @abc.abstractmethod
  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a record.

    Args:
      record: index of the record.
      keys: features to return if present; None returns all. An image file is read only if its key
        is requested.

    Raises:
      RecordError: if a checksum does not match.
      FeatureError: if the record is malformed or its image file is unusable.
      OSError: if the file cannot be read.
    """
