import dataclasses

import jax
from jax.sharding import AxisType
import pytest

from ov_sharding import AXES, MeshConfig, make_mesh


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
