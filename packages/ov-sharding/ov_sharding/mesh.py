"""Device mesh with three named axes over all devices of all hosts.

data    data parallelism; the only axis that spans TPU slices
fsdp    data parallelism with sharded parameters and optimizer state
tensor  tensor parallelism over heads, MLP and vocabulary; input batches are split over it too
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes. At most one may be -1, which infers it from the device count."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self) -> None:
    for axis, size in zip(AXES, self.sizes, strict=True):
      if size != -1 and size < 1:
        raise ValueError(f"mesh {axis}={size}; expected a positive size, or -1 to infer it.")
    if self.sizes.count(-1) > 1:
      raise ValueError(f"mesh {self} has more than one -1; only one size can be inferred.")

  @property
  def sizes(self) -> tuple[int, int, int]:
    return (self.data, self.fsdp, self.tensor)

  def __str__(self) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))

  def resolve(self, num_devices: int) -> "MeshConfig":
    """Return the config with the inferred size filled in.

    Raises:
      ValueError: if the product of the sizes is not `num_devices`.
    """
    known = math.prod(size for size in self.sizes if size != -1)
    if -1 in self.sizes and num_devices % known == 0:
      inferred = num_devices // known
      return MeshConfig(*(inferred if size == -1 else size for size in self.sizes))
    if known != num_devices:
      wanted = f"a multiple of {known}" if -1 in self.sizes else f"exactly {known}"
      raise ValueError(
        f"mesh {self} needs {wanted} devices, but there are {num_devices}; set the sizes so that "
        f"their product is {num_devices}, or one of them to -1."
      )
    return self


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Return the mesh of `config` over `devices` (default: all devices of all hosts).

  Within a slice, JAX orders the devices for the interconnect. Several TPU slices are laid out along
  `data`, so only the gradient all-reduce crosses the data centre network. Axis types are Auto: the
  compiler propagates shardings.

  Raises:
    ValueError: if the product of the sizes is not the number of devices, or if `fsdp` and `tensor`
      do not fit into a slice.

  Examples:
    >>> import jax
    >>> import ov_sharding
    >>> mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:1])
    >>> dict(mesh.shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = config.resolve(len(devices)).sizes
  types = (AxisType.Auto,) * len(AXES)
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    # Only TPU devices have a slice_index; other platforms are treated as one slice.
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  shape = _within_slice(sizes, {index: len(members) for index, members in slices.items()})
  # A mesh axis may need part of a physical axis, such as fsdp=16 on 4 x 8 x 8 chips, which
  # `jax.make_mesh` does not support.
  parts = [
    mesh_utils.create_device_mesh(shape, slices[index], allow_split_physical_axes=True)
    for index in sorted(slices)
  ]
  return Mesh(np.concatenate(parts), AXES, axis_types=types)


def _within_slice(sizes: tuple[int, int, int], counts: Mapping[int, int]) -> tuple[int, int, int]:
  """Return the mesh sizes within one slice.

  Args:
    sizes: sizes of the full mesh.
    counts: number of devices of each slice.
  """
  data, fsdp, tensor = sizes
  (per_slice, *others) = set(counts.values())
  if others:
    raise ValueError(
      f"the mesh spans slices of {sorted(counts.values())} devices; expected slices of one size."
    )
  if per_slice % (fsdp * tensor):
    raise ValueError(
      f"mesh {MeshConfig(*sizes)} does not fit: fsdp x tensor = {fsdp * tensor} must divide the "
      f"{per_slice} devices of a slice, because only data spans the {len(counts)} slices; reduce "
      "fsdp or tensor and set data=-1."
    )
  return data // len(counts), fsdp, tensor
