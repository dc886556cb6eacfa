"""Where the records of a shard are: found once, verified, and stored in a sidecar file."""

from ov_data.index.build import Progress, load_index, load_indexes
from ov_data.index.sidecar import FORMAT, SUFFIX, Damage, ShardIndex, parse, serialise

__all__ = [
  "FORMAT",
  "SUFFIX",
  "Damage",
  "Progress",
  "ShardIndex",
  "load_index",
  "load_indexes",
  "parse",
  "serialise",
]
