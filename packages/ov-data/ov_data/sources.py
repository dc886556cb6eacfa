"""Records of a source in any of the formats of `ov_data.formats`."""

from collections.abc import Collection, Sequence
import contextlib
import dataclasses
import functools
import hashlib

from ov_data import formats
from ov_data.example import Feature
from ov_data.index import Progress
from ov_data.keep_list import KeepList
from ov_data.recaptions import FEATURE, Recaptions
from ov_data.record_source import Record
from ov_data.request import Request, Source
from ov_data.splits import Split

__all__ = ["Dataset", "Source"]

_PROBES = 16  # records inspected for missing keys


class Dataset:
  """The records 0 to len - 1 of a source, or those of its keep-list.

  Args:
    source: source to open.
    progress, run, cached_runs: see `Request`.

  Attributes:
    class_names, skips: see `RecordSource`.
    indexes: indexes of the shards; empty for formats without shards.
    keep: the keep-list; None without one.
    recaptions: the new captions; None without them.

  Raises:
    ValueError: if the path does not exist, shards are missing, the split is unknown, a split file
      is malformed, no record is usable, or the keep-list or the
      new captions are damaged or belong to other data.
  """

  def __init__(
    self,
    source: Source,
    progress: Progress | None = None,
    run: int = 1,
    cached_runs: int = 64,
  ):
    self.source = source
    # Verified first, because opening the records may build their index.
    self.keep = None if source.keep_list is None else KeepList.read(source.keep_list)
    self.recaptions = None if source.recaptions is None else Recaptions.open(source.recaptions)
    request = Request(source, Split.parse(source.split), progress, run, cached_runs, self.keep)
    self._records = formats.open_records(request)
    if not len(self._records):
      raise ValueError(f"split={source.split!r} selects none of the records of {source.path}")
    if self.keep is not None:
      self.keep.check_fits(self._records, str(source.keep_list))
    if self.recaptions is not None:
      self.recaptions.check_fits(self._records)
    self.class_names = self._records.class_names
    self.skips = self._records.skips
    self.indexes = self._records.indexes

  def __len__(self) -> int:
    return len(self._records if self.keep is None else self.keep)

  @property
  def fingerprint(self) -> str:
    """16 hex digits that depend on content, keep-list and new captions, not on their location."""
    parts = [self._records.fingerprint]
    parts += [] if self.keep is None else [self.keep.fingerprint]
    parts += [] if self.recaptions is None else [f"{FEATURE} {self.recaptions.fingerprint}"]
    return (
      parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    )

  def locate(self, record: int) -> tuple[str, int]:
    """Return the file of a record and the offset of the record's data in it."""
    return self._records.locate(self._number(record))

  def location(self, record: int) -> str:
    """Return the location of a record for a message: "FILE at byte 120"."""
    file, offset = self.locate(record)
    return f"{file} at {self._records.unit} {offset}"

  def read(self, record: int, keys: Collection[str] | None = None) -> Record:
    """Read a record; see `RecordSource.read`. Thread-safe."""
    number = self._number(record)
    found = self._records.read(number, keys)
    if self.recaptions is None or not (keys is None or FEATURE in keys):
      return found
    captions = self.recaptions[number]
    return (
      dataclasses.replace(found, texts={**found.texts, FEATURE: captions}) if captions else found
    )

  def features(self, record: int, keys: Collection[str] | None = None) -> dict[str, Feature]:
    """Read a record as features by name, with the image under the image key of the source."""
    return self.read(record, keys).features(self.source.image_key)

  def _number(self, record: int) -> int:
    """Return the number of a record among all records of the source."""
    return record if self.keep is None else self.keep[record]

  @property
  def present_keys(self) -> frozenset[str]:
    """Names of the features of the first records; empty if none of them can be read."""
    return frozenset(self._probed)

  @functools.cached_property
  def _probed(self) -> dict[str, bool]:
    """The feature names of the first records, and whether they hold bytes."""
    found: dict[str, bool] = {}
    for record in range(min(_PROBES, len(self))):
      with contextlib.suppress(ValueError, OSError):  # counted when the loader reads it
        for key, value in self.features(record).items():
          found[key] = isinstance(value, list) or found.get(key, False)
    return found

  def check_keys(self, extra_keys: Sequence[str] = (), *, captions: bool = True) -> None:
    """Check the keys against the first records, so that a misspelt key fails before training.

    Args:
      extra_keys: features to check in addition to the image key of the source.
      captions: whether to check the caption keys of the source too.

    Raises:
      ValueError: if no record has a key, or images or captions are numbers; the message lists the
        existing keys.
    """
    caption_keys = self.source.caption_keys if captions else ()
    place = f"the first {min(_PROBES, len(self))} records of {self.source.path}"
    there = f"they have {', '.join(sorted(self._probed))}"
    for key in (self.source.image_key, *caption_keys, *extra_keys):
      if self._probed and key not in self._probed:
        raise ValueError(
          f"feature {key!r} is in none of {place}; {there}. Set image_key and caption_keys to what "
          "is there."
        )
      if key not in extra_keys and not self._probed.get(key, True):
        raise ValueError(
          f"feature {key!r} holds numbers in {place}, and images and captions are bytes; {there}. "
          "Set image_key and caption_keys to other features."
        )
