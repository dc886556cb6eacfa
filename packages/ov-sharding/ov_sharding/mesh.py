"""The device mesh: three named axes over all devices of all hosts.

data    replicas; each sees other rows of the batch; the only one that goes across TPU slices
fsdp    also other rows; params and optimizer state are split over it
tensor  also other rows of the input; heads, mlp and vocabulary are split over it
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
  """Sizes of the mesh axes. At most one is -1: whatever the other two leave of the devices."""

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
    """The same mesh with every size known.

    Raises:
      ValueError: when the sizes do not multiply to `num_devices`.
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
  """The mesh of `config` over `devices` (default: all of them, on all hosts).

  Within a slice the order of devices is the one that jax picks for the interconnect.
  Several TPU slices, which only the network of the data centre joins, follow one another along
  `data`: what crosses that network is the mean of the gradients. Axis types are Auto: the compiler
  propagates shardings.

  Raises:
    ValueError: when the sizes do not multiply to the number of devices, or `fsdp` and `tensor` do
      not stay within a slice.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = config.resolve(len(devices)).sizes
  types = (AxisType.Auto,) * len(AXES)
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    # Only TPUs know of slices; what else has several hosts is one network to this package.
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  shape = _within_slice(sizes, {index: len(members) for index, members in slices.items()})
  # A slice may have no axes of just these lengths: fsdp=16 on 4 x 8 x 8 chips. Where whole ones do
  # not do, parts of them are taken; `jax.make_mesh` refuses.
  parts = [
    mesh_utils.create_device_mesh(shape, slices[index], allow_split_physical_axes=True)
    for index in sorted(slices)
  ]
  return Mesh(np.concatenate(parts), AXES, axis_types=types)


def _within_slice(sizes: tuple[int, int, int], counts: Mapping[int, int]) -> tuple[int, int, int]:
  """Sizes of the part of a mesh that is in one slice.

  Args:
    sizes: of the whole mesh.
    counts: devices of each slice.
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
      f"{per_slice} devices of a slice, for only data goes across the {len(counts)} slices; make "
      "fsdp or tensor smaller, and data -1."
    )
  return data // len(counts), fsdp, tensor
