import dataclasses

import jax
from jax.sharding import AxisType
import numpy as np
import pytest

from ov_sharding import AXES, MeshConfig, make_mesh, process_rows


@pytest.mark.parametrize(
  "config, devices, sizes",
  [
    (MeshConfig(), 8, (8, 1, 1)),
    (MeshConfig(), 1, (1, 1, 1)),
    (MeshConfig(data=-1, fsdp=4), 8, (2, 4, 1)),
    (MeshConfig(data=1, fsdp=-1), 256, (1, 256, 1)),
    (MeshConfig(data=2, fsdp=2, tensor=-1), 12, (2, 2, 3)),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
  ],
)
def test_resolve(config, devices, sizes):
  assert config.resolve(devices).sizes == sizes


@pytest.mark.parametrize(
  "config, devices, message",
  [
    (MeshConfig(2, 2, 2), 4, "data=2 x fsdp=2 x tensor=2 needs exactly 8 devices.* there are 4"),
    (MeshConfig(1, 1, 1), 8, "data=1 x fsdp=1 x tensor=1 needs exactly 1 devices.* there are 8"),
    (MeshConfig(-1, 3, 1), 8, "data=-1 x fsdp=3 x tensor=1 needs a multiple of 3 devices"),
    (MeshConfig(-1, 16, 1), 8, "needs a multiple of 16 devices, but there are 8"),
  ],
)
def test_sizes_that_do_not_fit(config, devices, message):
  with pytest.raises(ValueError, match=message):
    config.resolve(devices)


@pytest.mark.parametrize(
  "sizes, message",
  [
    ((0, 1, 1), "mesh data=0; expected a positive size, or -1"),
    ((1, -2, 1), "mesh fsdp=-2"),
    ((-1, -1, 1), "data=-1 x fsdp=-1 x tensor=1 has more than one -1"),
  ],
)
def test_impossible_sizes(sizes, message):
  with pytest.raises(ValueError, match=message):
    MeshConfig(*sizes)


def test_config_is_frozen_and_hashable():
  with pytest.raises(dataclasses.FrozenInstanceError):
    MeshConfig().data = 2
  assert hash(MeshConfig()) == hash(MeshConfig(-1, 1, 1))


def test_mesh_of_one_device():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert mesh.axis_names == AXES
  assert mesh.axis_types == (AxisType.Auto,) * 3


@dataclasses.dataclass(frozen=True)
class Chip:
  """Fake v4 chip with the attributes that mesh construction reads."""

  id: int
  slice_index: int
  process_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v4"


def sliced(*counts):
  """Return the chips of slices of these sizes in reverse order; two chips form one host."""
  positions = [(index, chip) for index, count in enumerate(counts) for chip in range(count)]
  chips = [Chip(i, s, i // 2, (chip % 2, chip // 2, 0)) for i, (s, chip) in enumerate(positions)]
  return chips[::-1]


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_mesh_axis_that_splits_a_physical_axis(fsdp):
  """v4-512 has 4 x 8 x 8 chips, so an axis of 16 uses one of 8 and half of another."""
  chips = [Chip(i, 0, i // 4, tuple(coords)) for i, coords in enumerate(np.ndindex(4, 8, 8))]
  mesh = make_mesh(MeshConfig(-1, fsdp, 1), chips)
  assert mesh.devices.shape == (256 // fsdp, fsdp, 1)
  assert {device.id for device in mesh.devices.flat} == set(range(256))


@pytest.mark.parametrize(
  "config, shape",
  [
    (MeshConfig(), (8, 1, 1)),
    (MeshConfig(-1, 4, 1), (2, 4, 1)),
    (MeshConfig(4, 1, -1), (4, 1, 2)),
    (MeshConfig(-1, 2, 2), (2, 2, 2)),
  ],
)
def test_only_data_spans_slices(config, shape):
  mesh = make_mesh(config, sliced(4, 4))
  assert mesh.devices.shape == shape and mesh.axis_types == (AxisType.Auto,) * 3
  assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
  index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  # The first half of data is the first slice for any fsdp and tensor.
  expected = np.repeat([0, 1], shape[0] // 2)[:, None, None]
  np.testing.assert_array_equal(index, np.broadcast_to(expected, shape))


def test_hosts_of_all_slices_share_the_rows(monkeypatch):
  mesh = make_mesh(MeshConfig(-1, 2, 1), sliced(4, 4, 4))
  rows = []
  for process in range(6):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    rows.append(process_rows(mesh, 24))
  assert sorted((r.start, r.stop) for r in rows) == [(i, i + 4) for i in range(0, 24, 4)]
  slices = [process // 2 for process in sorted(range(6), key=lambda p: rows[p].start)]
  assert slices == [0, 0, 1, 1, 2, 2]  # the rows of a slice are contiguous


@pytest.mark.parametrize(
  "config, counts, message",
  [
    (
      MeshConfig(1, -1, 1),
      (4, 4),
      "data=1 x fsdp=8 x tensor=1 .* fsdp x tensor = 8 must divide the 4",
    ),
    (
      MeshConfig(-1, 3, 1),
      (4, 4, 4),
      "fsdp x tensor = 3 must divide the 4 devices .* the 3 slices",
    ),
    (MeshConfig(2, 2, 2), (6, 2), r"slices of \[2, 6\] devices; expected slices of one size"),
    (MeshConfig(-1, 3, 1), (4, 4), "needs a multiple of 3 devices, but there are 8"),
  ],
)
def test_sizes_that_do_not_fit_into_slices(config, counts, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(config, sliced(*counts))
