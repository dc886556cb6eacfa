"""What users type: names, zones, buckets, topologies; checked before any of it reaches gcloud."""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
import re

# Names of resources; RFC 1035, as the cloud has them.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]{1,2}-[a-z]")
_PROJECT = re.compile(r"([a-z][-a-z0-9.]{0,61}:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
_RUN = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,63}")
_VERSION = re.compile(r"[a-z0-9][-.a-z0-9]{0,62}")
_BUCKET = re.compile(r"gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9](/[-_.=+/A-Za-z0-9]*)?")


def name(value: str, flag: str = "--name") -> str:
  """The name of a TPU; raises ValueError if it is none."""
  return _checked(value, flag, _NAME, "lower-case letters, digits and dashes, a letter first")


def zone(value: str) -> str:
  return _checked(value, "--zone", _ZONE, "a zone such as us-central2-b")


def project(value: str) -> str:
  return _checked(value, "--project", _PROJECT, "the id of a project, such as my-project-123")


def run_name(value: str) -> str:
  """The name of a run is a folder on the workers."""
  return _checked(value, "--run", _RUN, "letters, digits, dots, dashes, at most 64")


def version(value: str) -> str:
  return _checked(value, "--version", _VERSION, "a runtime version such as tpu-ubuntu2204-base")


def bucket(value: str, flag: str) -> str:
  return _checked(value, flag, _BUCKET, "gs://BUCKET or gs://BUCKET/PATH")


def _checked(value: str, flag: str, pattern: re.Pattern[str], expected: str) -> str:
  if not value:
    raise ValueError(f"{flag} is missing; expected {expected}")
  if not pattern.fullmatch(value):
    raise ValueError(f"{flag}={value!r}; expected {expected}")
  return value


@dataclasses.dataclass(frozen=True)
class Generation:
  """What the kinds of TPU differ in.

  Attributes:
    version: runtime version of its virtual machines.
    gke: the value of GKE's node label cloud.google.com/gke-tpu-accelerator.
    per_chip: what the number in a topology's name counts, for each chip: cores or chips.
    single_host: the largest number of chips that one host holds.
    shapes: chips to how they are joined.
  """

  version: str
  gke: str
  per_chip: int
  single_host: int
  shapes: Mapping[int, tuple[int, ...]]


# From one host of 4 chips on; the cloud offers more shapes, these are the usual ones.
_CUBES = {
  4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
  256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
}  # fmt: skip
_SQUARES = {
  1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
}  # fmt: skip
_LARGE_CUBES = {4096: (16, 16, 16), 6144: (16, 16, 24)}

GENERATIONS = {
  "v4": Generation("tpu-ubuntu2204-base", "tpu-v4-podslice", 2, 4, _CUBES),
  "v5litepod": Generation("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, 8, _SQUARES),
  "v5p": Generation("v2-alpha-tpuv5", "tpu-v5p-slice", 2, 4, _CUBES | _LARGE_CUBES),
  "v6e": Generation("v2-alpha-tpuv6e", "tpu-v6e-slice", 1, 8, _SQUARES),
}
_ALSO = {"v5e": "v5litepod"}  # as documentation has it, for what commands call it
# A slice of several hosts has four chips on each, of every generation.
_CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice by its name in the cloud; the number counts cores of v4 and v5p, else chips."""

  name: str
  generation: Generation
  chips: int

  @classmethod
  def parse(cls, value: str) -> "Topology":
    """`v4-512` and the like; raises ValueError for what the cloud does not have."""
    kind, _, number = value.partition("-")
    kind = _ALSO.get(kind, kind)
    if kind not in GENERATIONS or not number.isascii() or not number.isdecimal():
      kinds = ", ".join(f"{k}-N" for k in GENERATIONS)
      raise ValueError(f"--topology={value!r}; expected one of {kinds}, such as v4-512")
    generation = GENERATIONS[kind]
    sizes = [chips * generation.per_chip for chips in generation.shapes]
    if number not in map(str, sizes):
      offered = ", ".join(map(str, sizes))
      raise ValueError(f"--topology={value!r}; {kind} comes in the sizes {offered}")
    return cls(f"{kind}-{number}", generation, int(number) // generation.per_chip)

  @property
  def hosts(self) -> int:
    """Virtual machines, one worker each."""
    return 1 if self.chips <= self.generation.single_host else self.chips // _CHIPS_PER_HOST

  @property
  def chips_per_host(self) -> int:
    return self.chips // self.hosts

  @property
  def shape(self) -> str:
    """How the chips are joined, as GKE and libtpu write it."""
    return "x".join(map(str, self.generation.shapes[self.chips]))

  def __str__(self) -> str:
    chips, hosts = _count(self.chips, "chip"), _count(self.hosts, "host")
    return f"{self.name}: {chips} ({self.shape}) on {hosts}"


def _count(number: int, what: str) -> str:
  return f"{number:,} {what}" + ("" if number == 1 else "s")


def local_file(value: str, flag: str) -> str:
  """A path here, as gcloud scp takes it: whole, so that it is no flag, and not HOST:PATH."""
  path = str(Path(value).expanduser().absolute())
  if ":" in path:
    raise ValueError(f"{flag}={value!r}; expected a path without a colon")
  return path


def cost(topology: Topology, hours: float | None, price: float | None) -> str:
  """A reminder of what is about to be paid; an amount only where the user gave the price.

  Raises:
    ValueError: hours or a price that are no positive numbers.
  """
  for flag, value in (("--hours", hours), ("--price_per_chip_hour", price)):
    if value is not None and not (math.isfinite(value) and value > 0):
      raise ValueError(f"{flag}={value}; expected a number above 0")
  text = f"{_count(topology.chips, 'chip')}, {topology.chips:,} chip-hours an hour until deleted"
  if price is not None:
    text += f", {topology.chips * price:,.2f} an hour at {price:g} a chip-hour"
    if hours is not None:
      text += f", {topology.chips * price * hours:,.2f} for {hours:g} hours"
  elif hours is not None:
    text += f", {topology.chips * hours:,.0f} chip-hours in {hours:g} hours"
  return text
