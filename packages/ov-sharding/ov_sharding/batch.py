"""Host batches to global arrays and back.

The leading dimension of a batch is split over all three mesh axes jointly: every device gets other
rows. A host therefore reads one contiguous slice of each global batch, `process_rows`.
"""

from typing import TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

Tree = TypeVar("Tree")


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading dimension over all mesh axes jointly, the rest whole."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, global_batch_size: int) -> slice:
  """The rows of each global batch that this process reads.

  Processes take slices in the order in which their devices first appear in the mesh. Where the
  interconnect makes the mesh alternate between hosts, the rows of the global array are in device
  order, a fixed permutation of these slices: every row is there once, on a device of its host.

  Raises:
    ValueError: when the batch does not divide by the number of devices, or this process has none.
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
  """Global arrays from the rows of each host.

  Args:
    host_batch: tree of numpy arrays [b, ...], the rows `process_rows(mesh, B)` of the batch.
    mesh: its devices receive the rows.

  Returns:
    The same tree of `jax.Array` [B, ...] with `batch_sharding(mesh)`.

  Raises:
    ValueError: when a leading dimension does not divide by the devices of this process.
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
  """The rows of this process, in the order in which `global_batch` took them.

  Args:
    tree: of `jax.Array` [B, ...] with `batch_sharding(mesh)`.

  Returns:
    The same tree of numpy arrays [b, ...].
  """

  def fetch(x: jax.Array) -> np.ndarray:
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

  return jax.tree.map(fetch, tree)


def to_host(tree: Tree) -> Tree:
  """Numpy copies of global arrays, whole on every process.

  Arrays that this process can see in full are copied; others are gathered, which every process
  must then do together.
  """

  def fetch(x: jax.Array) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(jax.device_get(x))

  return jax.tree.map(fetch, tree)
