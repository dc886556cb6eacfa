"""Where arrays live: the device mesh, logical axis rules, host batches, multi-host start-up."""

from ov_sharding.batch import (
  batch_sharding,
  global_batch,
  local_rows,
  process_rows,
  replicated,
  to_host,
)
from ov_sharding.distributed import initialize, is_google_host
from ov_sharding.key_values import Board, board
from ov_sharding.mesh import AXES, MeshConfig, make_mesh
from ov_sharding.rules import (
  DEFAULT_RULES,
  describe_shardings,
  logical_sharding,
  tree_shardings,
)
from ov_sharding.state import bytes_per_device, state_shardings

__all__ = [
  "AXES",
  "Board",
  "DEFAULT_RULES",
  "MeshConfig",
  "batch_sharding",
  "board",
  "bytes_per_device",
  "describe_shardings",
  "global_batch",
  "initialize",
  "is_google_host",
  "local_rows",
  "logical_sharding",
  "make_mesh",
  "process_rows",
  "replicated",
  "state_shardings",
  "to_host",
  "tree_shardings",
]
