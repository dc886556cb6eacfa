"""TPU slices by their cloud names, and what one chip can do.

  topology = parse("v4-512")          # 512 cores are 256 chips, 4 x 8 x 8
  devices = topology.devices()        # to compile for; needs libtpu, and no TPU

A device is a chip: the two cores of a v4 or v5p chip run as one (megacore).
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

GIB = 2**30
NO_LIBTPU = (
  "compiling for {name} needs libtpu, not a TPU: set OV_EXTRAS=tpu in the shell or in user.bazelrc "
  "(CONTRIBUTING.md) and start again"
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    name: as clouds call it.
    kind: as libtpu calls it.
    peak_flops: dense bfloat16, FLOP/s.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s that leave and enter a chip over all links, one direction.
    usable_hbm: bytes that the compiler lets a program use.
    dims: of the torus.
    cores: that a cloud name counts for each chip.
    chips_per_host: of slices with more than one host.
    largest: chips of the largest slice.
  """

  name: str
  kind: str
  peak_flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  usable_hbm: int
  dims: int
  cores: int
  chips_per_host: int
  largest: int


# Speeds: the pages of Google Cloud's documentation on each chip (cloud.google.com/tpu/docs/v4, v5e,
# v5p, v6e), read in November 2026; links of both directions together count half.
# Usable HBM: what libtpu 0.0.42.1 names when it refuses a program as too large for this chip.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", "TPU v4", 275e12, 1.2e12, 300e9, int(30.75 * GIB), 3, 2, 4, 4096),
    Chip("v5e", "TPU v5 lite", 197e12, 0.819e12, 200e9, int(15.75 * GIB), 2, 1, 4, 256),
    Chip("v5p", "TPU v5p", 459e12, 2.765e12, 600e9, int(95.74 * GIB), 3, 2, 4, 8960),
    Chip("v6e", "TPU v6e", 918e12, 1.638e12, 400e9, int(31.25 * GIB), 2, 1, 4, 256),
  )
}
_NAME = re.compile(r"(v4|v5litepod|v5e|v5p|v6e)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Topology:
  """Equal slices of one kind of chip."""

  chip: Chip
  shape: tuple[int, ...]  # chips of one slice along each dimension
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def hosts(self) -> int:
    return max(self.chips // self.chip.chips_per_host, self.slices)

  @property
  def name(self) -> str:
    per_slice = f"{self.chip.name}-{math.prod(self.shape) * self.chip.cores}"
    return per_slice if self.slices == 1 else f"{self.slices} x {per_slice}"

  def devices(self) -> Sequence[Any]:
    """Devices to compile for; they hold no memory and run nothing.

    Raises:
      ValueError: libtpu is not installed.
    """
    if not has_libtpu():
      raise ValueError(NO_LIBTPU.format(name=self.name))
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if self.slices > 1:
      options["num_slices"] = self.slices
    if self.chip.cores > 1:
      options["chip_config_name"] = "megacore"
    if math.prod(self.shape) < self.chip.chips_per_host:  # a part of a host
      options["chips_per_host_bounds"] = (*self.shape, 1)[:3]
    shape = "x".join(map(str, self.shape))
    described = topologies.get_topology_desc(f"{self.chip.name}:{shape}", "tpu", **options)
    return list(described.devices)


# Graphics cards a run may stand on, from data sheets: bfloat16 FLOP/s and bytes/s of memory. Links
# are not counted, and how much memory there is, the device says.
_GPUS = {
  "NVIDIA A100": (312e12, 2.0e12),
  "NVIDIA H100": (989e12, 3.35e12),
  "NVIDIA H200": (989e12, 4.8e12),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """The machine a run is planned for.

  Attributes:
    name: for the reader.
    chip: None where its speed is not known.
    chips: devices of a run.
    hosts: machines that read data.
    hbm: bytes a program may use on each device; None where that is not known.
    topology: None for the devices of this machine.
  """

  name: str
  chip: Chip | None
  chips: int
  hosts: int
  hbm: int | None
  topology: Topology | None

  def devices(self) -> Sequence[Any]:
    """Those to compile for; see `Topology.devices`."""
    import jax

    return jax.devices() if self.topology is None else self.topology.devices()


def target(name: str, slices: int = 1) -> Target:
  """The machine called `name`, see `parse`; "here": the devices of this one."""
  if name != "here":
    found = parse(name, slices)
    return Target(found.name, found.chip, found.chips, found.hosts, found.chip.usable_hbm, found)
  import jax

  device = jax.devices()[0]
  kind = next((kind for kind in _GPUS if device.device_kind.startswith(kind)), None)
  chip = Chip(kind, kind, *_GPUS[kind], math.inf, 0, 0, 1, 0, 0) if kind else None
  hbm = (device.memory_stats() or {}).get("bytes_limit")
  name = f"{jax.device_count()} x {device.device_kind}"
  return Target(name, chip, jax.device_count(), jax.process_count(), hbm, None)


def prepare_environment() -> None:
  """Tells libtpu that there is no TPU to look for; call it before jax is imported."""
  for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks a metadata server that only clouds have
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)


def can_compile(target: Target) -> bool:
  """Whether programs for this machine can be compiled here."""
  return target.topology is None or has_libtpu()


def has_libtpu() -> bool:
  """Whether programs can be compiled for TPUs here."""
  return importlib.util.find_spec("libtpu") is not None


def parse(name: str, slices: int = 1) -> Topology:
  """The topology of a cloud name such as v4-512, v5litepod-16, v5e-16, v5p-128 or v6e-64.

  Args:
    name: v4 and v5p count cores, two of which are a chip; v5e and v6e count chips.
    slices: how many such slices work together over the data-centre network.

  Raises:
    ValueError: an unknown name, or a size that no slice has.
  """
  found = _NAME.fullmatch(name)
  if not found:
    raise ValueError(
      f"--topology={name}: expected a cloud name such as v4-512, v5litepod-16, v5p-128 or v6e-64, "
      'or "here" for the devices of this machine'
    )
  if slices < 1:
    raise ValueError(f"--slices={slices}; expected at least 1")
  chip = CHIPS["v5e" if found[1] == "v5litepod" else found[1]]
  chips, rest = divmod(int(found[2]), chip.cores)
  shape = None if rest else slice_shape(chips, chip)
  if shape is None:
    sizes = ", ".join(f"{chip.name}-{n * chip.cores}" for n in _sizes(chip))
    raise ValueError(f"--topology={name}: {chip.name} comes as {sizes}")
  return Topology(chip, shape, slices)


def slice_shape(chips: int, chip: Chip) -> tuple[int, ...] | None:
  """The usual shape of a slice of so many chips, as near to a cube as it goes; None: no such."""
  if chips not in _sizes(chip):
    return None
  sizes = [1] * chip.dims
  for _ in range(chips.bit_length() - 1):
    sizes[sizes.index(min(sizes))] *= 2
  sizes.sort()
  return tuple(sizes if chips > 4 else reversed(sizes))


def smallest(chip: Chip, chips: int) -> Topology | None:
  """The smallest slice of a multiple of `chips` chips, at least four; None: there is none."""
  for size in _sizes(chip):
    shape = slice_shape(size, chip)
    if shape and size >= 4 and size % chips == 0:
      return Topology(chip, shape)
  return None


def _sizes(chip: Chip) -> list[int]:
  """Chips of the slices a cloud offers: powers of two; part of a host for flat ones only."""
  if chip.dims == 2:
    return [1, 4, 8, 16, 32, 64, 128, 256]
  return [2**i for i in range(2, chip.largest.bit_length())]
