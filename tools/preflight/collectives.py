"""What devices send each other in one step, read from the compiled program, and what must not be.

found = collectives(program, mesh_shape)
activation_gathers(found, ...), replicated_params(...)      # faults; none are expected
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from tools.preflight.hlo import Program

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_SMALL = 2**20  # bytes; smaller arrays matter to nobody


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    axes: of the mesh along which devices exchange; ("?",) where the text does not tell.
    group: devices that take part together.
    times: how often in one step.
    payload: bytes of the whole array of a device: gathered, or before it is scattered.
    elements: entries of that array.
    name: where in the traced program it comes from.
    source: file and line of that.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  times: int
  payload: int
  elements: int
  name: str
  source: str

  @property
  def sent(self) -> float:
    """Bytes a device sends in one step, by a ring: (n - 1) / n of the array, twice to reduce."""
    if self.kind == "collective-permute":
      return float(self.times * self.payload)
    share = (self.group - 1) / self.group
    return self.times * self.payload * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
  """All exchanges of a program.

  Args:
    program: compiled for this mesh.
    mesh: name -> size of the axes, in the order of the devices.
  """
  made = {i.name: i for instructions in program.computations.values() for i in instructions}
  scatters = {i.name for name in program.computations if name.startswith("all-reduce-scatter")
              for i in program.computations[name]}  # fmt: skip
  found = []
  for instruction, times in program.executed(inside=True):
    kind = instruction.operation.removesuffix("-start")
    if kind not in _KINDS:
      continue
    group = _group(instruction.attributes, math.prod(mesh.values()))
    if kind == "all-reduce" and instruction.name in scatters:
      kind = "reduce-scatter"  # the TPU compiler's form of it
    arrays = instruction.arrays
    if kind == "reduce-scatter" and instruction.operation.startswith("reduce-scatter"):
      arrays = tuple(a for name in instruction.operands if name in made for a in made[name].arrays)
    elif instruction.operation.endswith("-start"):
      arrays = (max(arrays, key=lambda a: a.bytes),)  # beside it: the operand, counters
    found.append(
      Collective(
        kind,
        _axes(group, mesh),
        len(group) if group else math.prod(mesh.values()),
        times,
        sum(a.bytes for a in arrays),
        sum(math.prod(a.dims) for a in arrays),
        instruction.op_name,
        program.source(instruction),
      )
    )
  return [c for c in found if c.group > 1]


def by_kind(found: Sequence[Collective]) -> list[tuple[str, str, int, float]]:
  """(kind, axes, exchanges per step, bytes a device sends), the largest first."""
  sums: dict[tuple[str, str], list[float]] = {}
  for one in found:
    total = sums.setdefault((one.kind, "+".join(one.axes)), [0, 0.0])
    total[0] += one.times
    total[1] += one.sent
  rows = [(kind, axes, int(times), sent) for (kind, axes), (times, sent) in sums.items()]
  return sorted(rows, key=lambda row: -row[3])


def activation_gathers(
  found: Sequence[Collective], params: Any, *, compared_bytes: int = 0
) -> list[Collective]:
  """All-gathers of 1 MiB and more that are of no parameter: activations that should have stayed.

  Args:
    found: of one program.
    params: tree of shapes. A gather of a parameter, or of one layer of it, has as many entries.
    compared_bytes: what a loss gathers in order to compare all rows; no array that small is meant.
  """
  sizes = set()
  for leaf in jax.tree.leaves(params):
    sizes |= {math.prod(leaf.shape), math.prod(leaf.shape[1:])}
  return [
    one
    for one in found
    if one.kind == "all-gather"
    and one.payload >= max(_SMALL, compared_bytes + 1)
    and one.elements not in sizes
  ]


def replicated_params(params: Any, shardings: Any, mesh: Mapping[str, int]) -> list[str]:
  """Paths of parameters of 1 MiB and more that are whole on every device although fsdp > 1."""
  if mesh["fsdp"] == 1:
    return []
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    if math.prod(leaf.shape) * leaf.dtype.itemsize >= _SMALL and sharding.is_fully_replicated
  ]


def _group(attributes: str, devices: int) -> list[int]:
  """The devices of the first group; [] where all take part, or the text does not tell."""
  if listed := _LISTED.search(attributes):
    return [int(device) for device in listed[1].split(",")]
  if iota := _IOTA.search(attributes):
    groups, size = int(iota[1]), int(iota[2])
    return _reshaped(iota[3], iota[4]).reshape(groups, size)[0].tolist()
  if mesh := _MESH.search(attributes):
    sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    names = re.findall(r"'([^']+)'", mesh[4])
    order = _reshaped(mesh[2] or str(devices), mesh[3]).reshape(tuple(sizes.values()))
    index = tuple(slice(None) if name in names else 0 for name in sizes)
    return order[index].reshape(-1).tolist()
  if pair := _PAIRS.search(attributes):
    return [int(pair[1]), int(pair[2])]
  return []


def _reshaped(dims: str, permutation: str | None) -> np.ndarray:
  sizes = [int(d) for d in dims.split(",")]
  order = np.arange(math.prod(sizes)).reshape(sizes)
  if permutation:
    order = order.transpose([int(p) for p in permutation.split(",")])
  return order.reshape(-1)


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Axes along which the places of these devices differ."""
  if not group:
    return tuple(axis for axis, size in mesh.items() if size > 1)
  if max(group) >= math.prod(mesh.values()):
    return ("?",)
  places = np.array(np.unravel_index(list(group), tuple(mesh.values())))
  return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)
