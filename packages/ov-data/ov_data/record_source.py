"""The interface of a data format: numbered records that are read one at a time.

Every format (TFRecord shards, image folders, split files) is one `RecordSource`. The loader and the
converter know nothing else about it.
"""

from collections.abc import Collection, Sequence
import dataclasses
from typing import Protocol

from ov_data.example import Feature


@dataclasses.dataclass(frozen=True)
class Skip:
  """An input that gives no record.

  Attributes:
    key: its name or position, such as "photos/1.heic" or "a.tfrecord at byte 120".
    reason: a short phrase, the same for all inputs of its kind, fit for counting.
    detail: what else helps to find the cause.
  """

  key: str
  reason: str
  detail: str = ""


class RecordSource(Protocol):
  """Records numbered 0 to len - 1, readable in any order and from many threads."""

  @property
  def class_names(self) -> tuple[str, ...] | None:
    """The names that the numbers under "label" stand for; None without such labels."""

  @property
  def skips(self) -> Sequence[Skip]:
    """The inputs that were found and give no record."""

  @property
  def fingerprint(self) -> str:
    """16 hex digits that change with the content, and not with its location."""

  def __len__(self) -> int:
    """Return the number of records."""

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file that holds a record, and the byte offset of the record in it."""

  def features(self, record: int, keys: Collection[str] | None = None) -> dict[str, Feature]:
    """Read a record.

    Args:
      record: number of the record.
      keys: features to return, those that are absent left out; None returns all. The bytes of an
        image file are read only if its feature is among them.

    Returns:
      The features by name: bytes features as lists, numbers as arrays.

    Raises:
      RecordError: the checksums do not fit the bytes.
      FeatureError: the record is no `tf.train.Example`, or its image file cannot be used.
      OSError: the file cannot be read.
    """
