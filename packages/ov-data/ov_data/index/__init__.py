"""Record indexes of shards: verified byte offsets, stored in a sidecar file."""

from ov_data.index.build import Progress, load_index, load_indexes
from ov_data.index.catalog import counts, damaged, paths_of
from ov_data.index.kind import TFRECORD, Columns, Damage, Scan, ShardKind
from ov_data.index.sidecar import FORMAT, SUFFIX, ShardIndex, parse, serialise

__all__ = [
  "FORMAT",
  "SUFFIX",
  "TFRECORD",
  "Columns",
  "Damage",
  "Progress",
  "Scan",
  "ShardIndex",
  "ShardKind",
  "counts",
  "damaged",
  "load_index",
  "load_indexes",
  "parse",
  "paths_of",
  "serialise",
]
