"""Validation of flag values, and TPU topologies by their Google Cloud names."""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
import re

_ADDRESS = r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"  # a leading dash would be an option of ssh
_BUCKET = r"gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]"
_PATH = r"[-_.=+/A-Za-z0-9]*"
# Flag -> pattern and description of valid values.
_EXPECTED = {
  "name": (
    r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", "lower-case letters, digits and dashes, a letter first"
  ),
  "zone": (r"[a-z]+-[a-z]+[0-9]{1,2}-[a-z]", "a zone such as us-central2-b"),
  "project": (
    r"([a-z][-a-z0-9.]{0,61}:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
    "the id of a project, such as my-project-123",
  ),
  "run": (r"[A-Za-z0-9][-_.A-Za-z0-9]{0,63}", "letters, digits, dots, dashes, at most 64"),
  "version": (r"[a-z0-9][-.a-z0-9]{0,62}", "a runtime version such as tpu-ubuntu2204-base"),
  "bucket": (rf"{_BUCKET}(/{_PATH})?", "gs://BUCKET or gs://BUCKET/PATH"),
  "workdir": (rf"{_BUCKET}/+[-_.=+A-Za-z0-9]{_PATH}", "gs://BUCKET/PATH, a folder for each run"),
  "time": (r"([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]", "HH:MM:SS or D-HH:MM:SS"),
  "partition": (r"[A-Za-z0-9][-_.A-Za-z0-9]*", "letters, digits, dots and dashes"),
  "image": (
    r"[a-z0-9][-._a-z0-9]*(:[0-9]+)?(/[-._a-z0-9]+)*(:[-._A-Za-z0-9]+)?(@sha256:[0-9a-f]{64})?",
    "the image of a registry: HOST/PATH:TAG",
  ),
  "hosts": (rf"([A-Za-z_][-._A-Za-z0-9]*@)?{_ADDRESS}", "HOST or USER@HOST, as ssh takes them"),
  "coordinator": (_ADDRESS, "the address of the first host"),
  "checkout": (r"/[^\x00-\x1f\x7f]*", "an absolute path, the same on all hosts"),
}  # fmt: skip


def check(kind: str, value: str, flag: str = "") -> str:
  """Return a value if it is well-formed.

  Args:
    kind: key of the pattern table.
    value: value given by the user.
    flag: name of the flag, if it differs from `kind`.

  Raises:
    ValueError: if the value is missing or malformed.
  """
  pattern, expected = _EXPECTED[kind]
  if not value:
    raise ValueError(f"--{flag or kind} is missing; expected {expected}")
  if not re.fullmatch(pattern, value):
    raise ValueError(f"--{flag or kind}={value!r}; expected {expected}")
  return value


def local_file(value: str, flag: str) -> str:
  """Return an absolute path for gcloud scp, which reads NAME:PATH as a path on a worker."""
  path = str(Path(value).expanduser().absolute())
  if ":" in path:
    raise ValueError(f"--{flag}={value!r}; expected a path without a colon")
  return path


@dataclasses.dataclass(frozen=True)
class Generation:
  """A TPU generation."""

  version: str  # runtime version of the virtual machines
  gke: str  # value of GKE's node label cloud.google.com/gke-tpu-accelerator
  per_chip: int  # units per chip in topology names: 2 if they count cores, otherwise 1
  single_host: int  # maximum number of chips of one host
  shapes: Mapping[int, tuple[int, ...]]  # shapes by number of chips; the cloud offers more


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
_CHIPS_PER_HOST = 4  # for slices of several hosts


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice by its cloud name, which counts cores for v4 and v5p, and otherwise chips."""

  name: str
  generation: Generation
  chips: int

  @classmethod
  def parse(cls, value: str) -> "Topology":
    """Parse a name such as v4-512; v5e-16 is accepted for v5litepod-16.

    Raises:
      ValueError: if the topology does not exist.
    """
    kind, _, number = value.partition("-")
    kind = "v5litepod" if kind == "v5e" else kind
    if kind not in GENERATIONS or not re.fullmatch("[0-9]+", number):
      kinds = ", ".join(f"{k}-N" for k in GENERATIONS)
      raise ValueError(f"--topology={value!r}; expected one of {kinds}, such as v4-512")
    generation = GENERATIONS[kind]
    sizes = {str(chips * generation.per_chip): chips for chips in generation.shapes}
    if number not in sizes:
      raise ValueError(f"--topology={value!r}; {kind} comes in the sizes {', '.join(sizes)}")
    return cls(f"{kind}-{number}", generation, sizes[number])

  @property
  def kind(self) -> str:
    """Return the key of the generation in `GENERATIONS`."""
    return self.name.partition("-")[0]

  @property
  def hosts(self) -> int:
    """Return the number of virtual machines; each is a worker."""
    return 1 if self.chips <= self.generation.single_host else self.chips // _CHIPS_PER_HOST

  @property
  def chips_per_host(self) -> int:
    return self.chips // self.hosts

  @property
  def shape(self) -> str:
    """Return the shape of the slice in the notation of GKE and libtpu, such as 4x8x8."""
    return "x".join(map(str, self.generation.shapes[self.chips]))

  def __str__(self) -> str:
    return (
      f"{self.name}: {_count(self.chips, 'chip')} ({self.shape}) on {_count(self.hosts, 'host')}"
    )


def _count(number: int, noun: str) -> str:
  return f"{number:,} {noun}{'s' * (number != 1)}"


def cost(topology: Topology, hours: float | None, price: float | None) -> str:
  """Return a reminder of the cost, with an amount if the price of a chip-hour is given.

  Raises:
    ValueError: if hours or price are not positive numbers.
  """
  for flag, value in (("hours", hours), ("price_per_chip_hour", price)):
    if value is not None and not (math.isfinite(value) and value > 0):
      raise ValueError(f"--{flag}={value}; expected a number above 0")
  chips = topology.chips
  text = f"{_count(chips, 'chip')}, {chips:,} chip-hours an hour until deleted"
  if price is not None:
    text += f", {chips * price:,.2f} an hour at {price:g} a chip-hour"
  if price is not None and hours is not None:
    text += f", {chips * price * hours:,.2f} for {hours:g} hours"
  elif hours is not None:
    text += f", {chips * hours:,.0f} chip-hours in {hours:g} hours"
  return text
