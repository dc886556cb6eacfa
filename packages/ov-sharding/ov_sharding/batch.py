"""Conversion between host batches and global arrays.

The leading dimension of a batch is split over all three mesh axes, so every device gets different
rows. Each host reads one contiguous slice of the global batch, `process_rows`.
"""

from typing import TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

Tree = TypeVar("Tree")


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding that splits the leading dimension over all mesh axes."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the fully replicated sharding."""
  return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, global_batch_size: int) -> slice:
  """Return the rows of each global batch that this process reads.

  Slices are assigned to processes in the order in which their devices first appear in the mesh. If
  the mesh alternates between hosts, the rows of the global array are a fixed permutation of these
  slices: every row occurs once, on a device of its host.

  Raises:
    ValueError: if the batch size is not divisible by the number of devices, or this process has no
      device in the mesh.

  Examples:
    >>> import jax
    >>> import ov_sharding
    >>> mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:1])
    >>> ov_sharding.process_rows(mesh, 64)
    slice(0, 64, None)
  """
  owners = [device.process_index for device in mesh.devices.flat]
  if global_batch_size < 1 or global_batch_size % len(owners):
    below = max(global_batch_size // len(owners), 1) * len(owners)
    raise ValueError(
      f"global batch size {global_batch_size} is not divisible by the {len(owners)} devices of "
      f"the mesh; nearest sizes: {below}, {below + len(owners)}."
    )
  process = jax.process_index()
  if process not in owners:
    raise ValueError(
      f"process {process} has no device in the mesh, so it has no rows to read; build the mesh "
      "from devices of all processes."
    )
  per_device = global_batch_size // len(owners)
  order = list(dict.fromkeys(owners))
  before = sum(owners.count(other) for other in order[: order.index(process)])
  start = before * per_device
  return slice(start, start + owners.count(process) * per_device)


def global_batch(host_batch: Tree, mesh: Mesh) -> Tree:
  """Return global arrays assembled from the rows of each host.

  Args:
    host_batch: tree of NumPy arrays [b, ...] with the rows `process_rows(mesh, B)` of the batch.
    mesh: device mesh that receives the rows.

  Returns:
    The same tree of `jax.Array` [B, ...] with `batch_sharding(mesh)`.

  Raises:
    ValueError: if a leading dimension is not divisible by the number of local devices.
  """
  sharding = batch_sharding(mesh)
  local = len(mesh.local_devices)

  def put(path: tuple, rows: np.ndarray) -> jax.Array:
    if not np.ndim(rows) or rows.shape[0] % local:
      raise ValueError(
        f"batch{jax.tree_util.keystr(path)} has shape {np.shape(rows)}; expected a leading "
        f"dimension divisible by the {local} devices of this process."
      )
    shape = (rows.shape[0] // local * mesh.size, *rows.shape[1:])
    return jax.make_array_from_process_local_data(sharding, rows, shape)

  return jax.tree_util.tree_map_with_path(put, host_batch)


def local_rows(tree: Tree) -> Tree:
  """Return the rows of this process, in the order of the input of `global_batch`.

  Args:
    tree: tree of `jax.Array` [B, ...] with `batch_sharding(mesh)`.

  Returns:
    The same tree of NumPy arrays [b, ...].
  """

  def fetch(x: jax.Array) -> np.ndarray:
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

  return jax.tree.map(fetch, tree)


def to_host(tree: Tree) -> Tree:
  """Return unsharded NumPy copies of global arrays on every process.

  Arrays that are not fully addressable are gathered, so all processes must call this together.
  """

  def fetch(x: jax.Array) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(jax.device_get(x))

  return jax.tree.map(fetch, tree)
