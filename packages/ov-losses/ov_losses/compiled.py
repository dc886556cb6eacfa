"""What the compiler says of a program that need not run, for the reports and the tests."""

import math
import re

import jax
from jax.experimental import topologies

MIB = 2**20


def topology_devices(topology: str | None) -> list[jax.Device]:
  """Devices to compile for: of a TPU that need not be there, such as "v5e:2x2", or those here."""
  if topology:
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)
  return jax.devices()


def temporary_bytes(lowered: jax.stages.Lowered) -> int:
  """What the compiled program allocates on each device beside its arguments and results."""
  analysis = lowered.compile().memory_analysis()
  if analysis is None:
    raise RuntimeError("this compiler has no memory analysis; use the CPU's or a TPU topology's.")
  return analysis.temp_size_in_bytes


def largest_array(compiled: jax.stages.Compiled) -> int:
  """Entries of the largest array that one device has to do with."""
  shapes = re.findall(r"\b[a-z]+\d+\w*\[([\d,]+)\]", compiled.as_text() or "")
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)
