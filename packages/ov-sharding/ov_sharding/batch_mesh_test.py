"""Tests of host batches and global arrays on 8 simulated devices of one process."""

from types import SimpleNamespace

import chex
import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_sharding import (
  AXES,
  MeshConfig,
  batch_sharding,
  global_batch,
  local_rows,
  make_mesh,
  process_rows,
  replicated,
  to_host,
)

BATCH = {
  "image": np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3),
  "ids": np.arange(16 * 5, dtype=np.int32).reshape(16, 5),
  "mask": np.arange(16 * 5).reshape(16, 5) % 3 == 0,
  "valid": np.arange(16) % 2 == 0,
}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (4, 2, 1)])
def test_content_and_placement(sizes):
  mesh = make_mesh(MeshConfig(*sizes))
  placed = global_batch(BATCH, mesh)
  for name, array in placed.items():
    assert array.sharding == batch_sharding(mesh)
    assert array.sharding.spec == P(AXES)
    # Rows 2i and 2i + 1 are on device i of the mesh for any mesh shape.
    for i, device in enumerate(mesh.devices.flat):
      shard = next(s for s in array.addressable_shards if s.device == device)
      np.testing.assert_array_equal(shard.data, BATCH[name][2 * i : 2 * i + 2])
  chex.assert_trees_all_equal(to_host(placed), BATCH)
  chex.assert_trees_all_equal(local_rows(placed), BATCH)
  chex.assert_trees_all_equal_dtypes(to_host(placed), BATCH)


def test_process_rows_of_one_process():
  mesh = make_mesh(MeshConfig(2, 2, 2))
  assert process_rows(mesh, 16) == slice(0, 16)
  for size, nearest in [(30, "24, 32"), (3, "8, 16"), (0, "8, 16")]:
    message = f"size {size} is not divisible by the 8 devices of the mesh; nearest sizes: {nearest}"
    with pytest.raises(ValueError, match=message):
      process_rows(mesh, size)


@pytest.mark.parametrize(
  "owners, rows",
  [
    ([0, 0, 1, 1], {0: slice(0, 4), 1: slice(4, 8)}),
    ([1, 1, 0, 0], {1: slice(0, 4), 0: slice(4, 8)}),
    ([0, 1, 0, 1], {0: slice(0, 4), 1: slice(4, 8)}),
    ([0, 0, 0, 1], {0: slice(0, 6), 1: slice(6, 8)}),
  ],
)
def test_process_rows_of_two_processes(owners, rows, monkeypatch):
  devices = np.array([SimpleNamespace(process_index=p) for p in owners])
  mesh = SimpleNamespace(devices=devices.reshape(1, 2, 2))
  for process, expected in rows.items():
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    assert process_rows(mesh, 8) == expected
  monkeypatch.setattr(jax, "process_index", lambda: 2)
  with pytest.raises(ValueError, match="process 2 has no device in the mesh"):
    process_rows(mesh, 8)


def test_indivisible_batch():
  mesh = make_mesh(MeshConfig())
  with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(6, 2\); expected a leading dim"):
    global_batch({"x": np.zeros((6, 2))}, mesh)
  with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(\)"):
    global_batch({"x": np.float32(1)}, mesh)


def test_mesh_over_some_devices():
  mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1), AXES)
  placed = global_batch({"x": np.arange(6)}, mesh)
  assert placed["x"].sharding.device_set == set(jax.devices()[:2])
  np.testing.assert_array_equal(to_host(placed["x"]), np.arange(6))


def test_to_host_takes_any_leaf():
  mesh = make_mesh(MeshConfig())
  tree = {"a": jax.device_put(np.ones(3), replicated(mesh)), "b": np.zeros(2), "c": 1.5}
  chex.assert_trees_all_equal(
    to_host(tree), {"a": np.ones(3), "b": np.zeros(2), "c": np.array(1.5)}
  )
