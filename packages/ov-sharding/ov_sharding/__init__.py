"""Sharding: device mesh, logical axis rules, host batches and multi-host initialisation."""

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
from ov_sharding.rules import tree_shardings
from ov_sharding.state import bytes_per_device, state_shardings

__all__ = [
  "AXES",
  "Board",
  "MeshConfig",
  "batch_sharding",
  "board",
  "bytes_per_device",
  "global_batch",
  "initialize",
  "is_google_host",
  "local_rows",
  "make_mesh",
  "process_rows",
  "replicated",
  "state_shardings",
  "to_host",
  "tree_shardings",
]
