"""TPU slices by their cloud names, and the speed and memory of chips.

  slice = parse("v4-512")          # 512 cores are 256 chips, 4 x 8 x 8
  devices = slice.devices()        # for compilation; needs libtpu but no TPU

A device is a chip: the two cores of a v4 or v5p chip act as one device (megacore).
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
from typing import Any

from tools.tpu import names

GIB = 2**30
NO_LIBTPU = (
  "compiling for {name} needs libtpu, not a TPU: set OV_EXTRAS=tpu in the shell or in user.bazelrc "
  "(CONTRIBUTING.md) and start again"
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """Speed and memory of one chip.

  Attributes:
    name: display name.
    peak_flops: peak FLOP/s of dense bfloat16 matmuls.
    hbm_bandwidth: memory bandwidth in bytes/s.
    ici_bandwidth: bytes/s over all links of a chip together, in one direction.
    usable_hbm: bytes that the compiler allows a program to use.
  """

  name: str
  peak_flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  usable_hbm: int


# Keys are the names of generations in `tools.tpu.names`.
# Speeds: Google Cloud documentation of each chip (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) in
# November 2026. Published link bandwidths cover both directions and are halved.
# Usable HBM: the limit in the out-of-memory error of libtpu 0.0.42.1 for this chip.
CHIPS = {
  "v4": Chip("v4", 275e12, 1.2e12, 300e9, int(30.75 * GIB)),
  "v5litepod": Chip("v5e", 197e12, 0.819e12, 200e9, int(15.75 * GIB)),
  "v5p": Chip("v5p", 459e12, 2.765e12, 600e9, int(95.74 * GIB)),
  "v6e": Chip("v6e", 918e12, 1.638e12, 400e9, int(31.25 * GIB)),
}


# GPUs, from their data sheets: dense bfloat16 FLOP/s, memory bandwidth in bytes/s, nominal bytes of
# memory. Links are not counted. The usable memory is known only on the device.
CARDS = {
  "l4": Chip("NVIDIA L4", 121e12, 0.3e12, math.inf, 24 * 10**9),
  "a100": Chip("NVIDIA A100", 312e12, 2.0e12, math.inf, 80 * 10**9),
  "h100": Chip("NVIDIA H100", 989e12, 3.35e12, math.inf, 80 * 10**9),
  "h200": Chip("NVIDIA H200", 989e12, 4.8e12, math.inf, 141 * 10**9),
}
_CARDS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Target:
  """The machine a run is planned for.

  Attributes:
    name: display name.
    chip: speed and memory of a device, or None if unknown.
    chips: number of devices of a run.
    hosts: number of hosts, which read the data.
    hbm: usable bytes on each device, or None if unknown.
    slice: slice of TPUs, or None for other devices.
    slices: number of such slices.
    here: whether the target is this machine.
  """

  name: str
  chip: Chip | None
  chips: int
  hosts: int
  hbm: int | None
  slice: names.Topology | None = None
  slices: int = 1
  here: bool = False

  def devices(self) -> Sequence[Any]:
    """Return devices for compilation; those of TPUs have no memory and cannot run programs.

    Raises:
      ValueError: if libtpu is not installed.
    """
    import jax

    if self.slice is None or self.chip is None:
      return jax.devices()
    if not has_libtpu():
      raise ValueError(NO_LIBTPU.format(name=self.name))
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if self.slices > 1:
      options["num_slices"] = self.slices
    if self.slice.generation.per_chip > 1:
      options["chip_config_name"] = "megacore"
    if self.slice.chips == 1:  # a part of a host
      options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{self.chip.name}:{self.slice.shape}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def target(name: str, slices: int = 1) -> Target:
  """Return the machine with this name.

  Args:
    name: a TPU slice (see `parse`); GPUs of `CARDS` with their number, such as h100-8; or "here"
      for this machine.
    slices: number of TPU slices (see `parse`).

  Raises:
    ValueError: if the name is unknown (see `parse`).
  """
  if name == "here":
    return _this_machine()
  kind, _, count = name.partition("-")
  if kind in CARDS and slices == 1 and (not count or (count.isdecimal() and int(count) > 0)):
    cards, chip = int(count or 1), CARDS[kind]
    hosts = -(-cards // _CARDS_OF_A_HOST)
    return Target(f"{cards} x {chip.name}", chip, cards, hosts, chip.usable_hbm)
  return parse(name, slices)


def _this_machine() -> Target:
  import jax

  device = jax.devices()[0]
  chip = next((c for c in CARDS.values() if device.device_kind.startswith(c.name)), None)
  hbm = (device.memory_stats() or {}).get("bytes_limit")
  name = f"{jax.device_count()} x {device.device_kind}"
  return Target(name, chip, jax.device_count(), jax.process_count(), hbm, here=True)


def prepare_environment() -> None:
  """Prevent libtpu from searching for a TPU. Call this before importing jax."""
  for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # this server exists only in the cloud
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)


def can_compile(target: Target) -> bool:
  """Return whether programs for a target can be compiled here."""
  return target.here or (target.slice is not None and has_libtpu())


def why_not(target: Target) -> str:
  """Return the reason why programs for a target cannot be compiled, and the remedy."""
  if target.slice is not None:
    return NO_LIBTPU.format(name=target.name)
  return f"programs for {target.name} compile only on that machine, with --topology=here"


def has_libtpu() -> bool:
  """Return whether libtpu is installed, so that programs for TPUs can be compiled."""
  return importlib.util.find_spec("libtpu") is not None


def parse(name: str, slices: int = 1) -> Target:
  """Parse the cloud name of a topology, such as v4-512, v5litepod-16, v5p-128 or v6e-64.

  Args:
    name: cloud name. v4 and v5p count cores, two per chip; v5e and v6e count chips.
    slices: number of slices connected by the data center network.

  Raises:
    ValueError: if the name is unknown or no slice has this size.
  """
  if slices < 1:
    raise ValueError(f"--slices={slices}; expected at least 1")
  try:
    found = names.Topology.parse(name)
  except ValueError as error:
    cards = ", ".join(f"{kind}-N" for kind in CARDS)
    raise ValueError(f'{error}; {cards} for cards; or "here" for this machine') from None
  chip, label = CHIPS[found.kind], found.name if slices == 1 else f"{slices} x {found.name}"
  chips, hosts = found.chips * slices, found.hosts * slices
  return Target(label, chip, chips, hosts, chip.usable_hbm, found, slices)


def smallest(like: names.Topology, chips: int) -> Target | None:
  """Return the smallest slice with at least four chips and a multiple of `chips`, or None."""
  for size in sorted(like.generation.shapes):
    if size >= 4 and size % chips == 0:
      return parse(f"{like.kind}-{size * like.generation.per_chip}")
  return None
