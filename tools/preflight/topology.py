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
from typing import Any

from tools.tpu import names

GIB = 2**30
NO_LIBTPU = (
  "compiling for {name} needs libtpu, not a TPU: set OV_EXTRAS=tpu in the shell or in user.bazelrc "
  "(CONTRIBUTING.md) and start again"
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do.

  Attributes:
    name: for the reader.
    peak_flops: dense bfloat16, FLOP/s.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s that leave and enter a chip over all links, one direction.
    usable_hbm: bytes that the compiler lets a program use.
  """

  name: str
  peak_flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  usable_hbm: int


# By the generation's name in `tools.tpu.names`.
# Speeds: the pages of Google Cloud's documentation on each chip (cloud.google.com/tpu/docs/v4, v5e,
# v5p, v6e), read in November 2026; links of both directions together count half.
# Usable HBM: what libtpu 0.0.42.1 names when it refuses a program as too large for this chip.
CHIPS = {
  "v4": Chip("v4", 275e12, 1.2e12, 300e9, int(30.75 * GIB)),
  "v5litepod": Chip("v5e", 197e12, 0.819e12, 200e9, int(15.75 * GIB)),
  "v5p": Chip("v5p", 459e12, 2.765e12, 600e9, int(95.74 * GIB)),
  "v6e": Chip("v6e", 918e12, 1.638e12, 400e9, int(31.25 * GIB)),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Equal slices of one kind of chip."""

  slice: names.Topology
  slices: int = 1

  @property
  def kind(self) -> str:
    """The generation, by its name in `CHIPS`."""
    return self.slice.name.partition("-")[0]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    return self.slice.chips * self.slices

  @property
  def hosts(self) -> int:
    return self.slice.hosts * self.slices

  @property
  def name(self) -> str:
    return self.slice.name if self.slices == 1 else f"{self.slices} x {self.slice.name}"

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
    if self.slice.generation.per_chip > 1:
      options["chip_config_name"] = "megacore"
    if self.slice.chips == 1:  # a part of a host
      options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{self.chip.name}:{self.slice.shape}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


# Graphics cards, from their data sheets: dense bfloat16 FLOP/s, bytes/s of memory, bytes of memory
# as sold. Links are not counted. What a program may use of the memory, only the device says.
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
    name: for the reader.
    chip: None where its speed is not known.
    chips: devices of a run.
    hosts: machines that read data.
    hbm: bytes a program may use on each device; None where that is not known.
    topology: of TPUs; None of others.
    here: whether it is this machine.
  """

  name: str
  chip: Chip | None
  chips: int
  hosts: int
  hbm: int | None
  topology: Topology | None
  here: bool

  def devices(self) -> Sequence[Any]:
    """Those to compile for; see `Topology.devices`."""
    import jax

    return jax.devices() if self.topology is None else self.topology.devices()


def target(name: str, slices: int = 1) -> Target:
  """The machine called `name`.

  Args:
    name: a TPU slice, see `parse`; h100-8, eight such cards of `CARDS`; or "here", this machine.
    slices: see `parse`.

  Raises:
    ValueError: as `parse`.
  """
  if name == "here":
    return _this_machine()
  kind, _, count = name.partition("-")
  if kind in CARDS and slices == 1 and (not count or (count.isdecimal() and int(count) > 0)):
    cards, chip = int(count or 1), CARDS[kind]
    hosts = -(-cards // _CARDS_OF_A_HOST)
    return Target(f"{cards} x {chip.name}", chip, cards, hosts, chip.usable_hbm, None, here=False)
  found = parse(name, slices)
  hbm = found.chip.usable_hbm
  return Target(found.name, found.chip, found.chips, found.hosts, hbm, found, here=False)


def _this_machine() -> Target:
  import jax

  device = jax.devices()[0]
  chip = next((c for c in CARDS.values() if device.device_kind.startswith(c.name)), None)
  hbm = (device.memory_stats() or {}).get("bytes_limit")
  name = f"{jax.device_count()} x {device.device_kind}"
  return Target(name, chip, jax.device_count(), jax.process_count(), hbm, None, here=True)


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
  return target.here or (target.topology is not None and has_libtpu())


def why_not(target: Target) -> str:
  """What stands in the way of compiling for this machine, and what to do."""
  if target.topology is not None:
    return NO_LIBTPU.format(name=target.name)
  return f"only a machine that has {target.name} compiles for it: --topology=here, there"


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
  if slices < 1:
    raise ValueError(f"--slices={slices}; expected at least 1")
  try:
    return Topology(names.Topology.parse(name), slices)
  except ValueError as error:
    cards = ", ".join(f"{kind}-N" for kind in CARDS)
    raise ValueError(f'{error}; {cards} for cards; or "here" for this machine') from None


def smallest(like: Topology, chips: int) -> Topology | None:
  """The smallest slice of such chips that holds a multiple of `chips`, at least four, or None."""
  generation = like.slice.generation
  for size in sorted(generation.shapes):
    if size >= 4 and size % chips == 0:
      return parse(f"{like.kind}-{size * generation.per_chip}")
  return None
