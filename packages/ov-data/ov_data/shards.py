"""Record source over TFRecord shards."""

from collections.abc import Collection

from ov_data import example, records
from ov_data.example import FeatureError
from ov_data.index import TFRECORD
from ov_data.record_source import Record
from ov_data.request import Request
from ov_data.shard_files import Raw, ShardFiles, ShardRuns
from ov_data.shard_names import find_shards, is_shard

__all__ = ["Shards", "find_shards", "is_shard", "open_shards"]


def open_shards(request: Request) -> ShardFiles | None:
  """Open TFRecord shards; return None if no file at the path has their name.

  Raises:
    ValueError, OSError: see `ShardFiles`.
  """
  return Shards(request) if any(map(is_shard, request.names)) else None


class Shards(ShardRuns):
  """The `tf.train.Example`s of TFRecord shards."""

  kind = TFRECORD

  def data(self, record: int) -> bytes:
    """Return the serialized `tf.train.Example` of a record after verifying its checksums.

    Raises:
      records.RecordError: if the bytes have changed since they were indexed.
      OSError: if the shard cannot be read.
    """
    return _data(self._raw(record))

  def _parse(self, raw: Raw, keys: Collection[str] | None) -> Record:
    try:
      return Record.of(example.parse(_data(raw), keys), self._image_key)
    except records.RecordError:
      raise
    except ValueError:
      raise FeatureError("not a tf.train.Example") from None


def _data(raw: Raw) -> bytes:
  return records.unframe(raw.data, raw.offset - records.HEADER_BYTES)
