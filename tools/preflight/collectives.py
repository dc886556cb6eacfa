"""Find the collectives of a compiled step, and report unwanted collectives and layouts.

found, unknown_loops = collectives(compiled.as_text(), mesh_shape)
activation_gathers(found, ...), replicated_params(...)      # errors; none are expected

XLA's cost analysis counts loop bodies once. The collectives of scanned layers are therefore counted
in the HLO text.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"(\d+)\)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_SMALL = 2**20  # bytes; smaller arrays are not reported


class _Instruction(NamedTuple):
  """One instruction of a computation; `rest` contains operands and attributes."""

  name: str
  shape: str
  operation: str
  rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    axes: mesh axes along which devices communicate, or ("?",) if unknown.
    group: number of devices in a group.
    times: number of executions per step.
    payload: bytes of the unsharded array, after a gather or before a scatter.
    elements: number of elements of that array.
    name: JAX's name of the operation in the traced program.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  times: int
  payload: int
  elements: int
  name: str

  @property
  def sent(self) -> float:
    """Return the bytes a device sends per step in a ring: (n - 1) / n, twice for reductions."""
    if self.kind == "collective-permute":
      return float(self.times * self.payload)
    fraction = (self.group - 1) / self.group
    return self.times * self.payload * fraction * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mapping[str, int]) -> tuple[list[Collective], list[str]]:
  """Return all collectives of a program, and its loops of unknown length.

  Collectives in loops are multiplied by the trip count, or by one if it is unknown.

  Args:
    text: HLO of a program compiled for this mesh.
    mesh: name -> size of the mesh axes, in device order.

  Raises:
    ValueError: if the text has no entry computation.
  """
  bodies, times, unknown = _executed(text)
  devices = math.prod(mesh.values())
  found = []
  for computation, instructions in bodies.items():
    for one in instructions if times[computation] else ():
      kind = one.operation.removesuffix("-start")
      if kind not in _KINDS:
        continue
      group = _group(one.rest, devices)
      members = len(group) if group else devices
      arrays = [_size(*array) for array in _ARRAY.findall(one.shape)]
      if one.operation.endswith("-start"):
        arrays = [max(arrays)]  # the other elements are the operand and counters
      scale = 1
      if one.operation == "reduce-scatter":  # the result is one shard of the payload
        scale = members
      elif kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # form of the TPU compiler
      name = re.search(r'op_name="([^"]*)"', one.rest)
      found.append(
        Collective(
          kind,
          _axes(group, mesh),
          members,
          times[computation],
          scale * sum(size for size, _ in arrays),
          scale * sum(elements for _, elements in arrays),
          name[1] if name else "",
        )
      )
  return [one for one in found if one.group > 1], unknown


def by_kind(found: Sequence[Collective]) -> list[tuple[str, str, int, float]]:
  """Return (kind, axes, number per step, bytes a device sends), largest first."""
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
  """Return all-gathers of at least 1 MiB that match no parameter, which gather activations.

  Args:
    found: collectives of one program.
    params: tree of parameter shapes. Gathers with the size of a parameter, or of one layer of a
      stacked parameter, are allowed.
    compared_bytes: bytes that a loss gathers to compare all rows; gathers up to this size are
      allowed.
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
  """Return the paths of parameters of at least 1 MiB that are replicated although fsdp > 1."""
  if mesh["fsdp"] == 1:
    return []
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    if math.prod(leaf.shape) * leaf.dtype.itemsize >= _SMALL and sharding.is_fully_replicated
  ]


def _executed(text: str) -> tuple[dict[str, list[_Instruction]], dict[str, int], list[str]]:
  """Return the instructions and execution count of each computation, and unknown loops."""
  bodies: dict[str, list[_Instruction]] = {}  # callees come before their callers
  entry, current = "", None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(_Instruction(*found.groups()))
  if not entry:
    raise ValueError("the text has no entry computation; expected compiled.as_text()")
  times = dict.fromkeys(bodies, 0) | {entry: 1}
  unknown = []
  for name in reversed(bodies):
    for one in bodies[name]:
      if one.operation.endswith(("-done", "-update")):
        continue  # refers to the computation that the matching -start already called
      called = _CALLED.findall(one.rest)
      called += [("", n) for b in _BRANCHES.findall(one.rest) for n in re.findall(r"[\w.\-]+", b)]
      turns = _turns(one, dict(called), bodies) if one.operation == "while" else 1
      if turns is None:
        unknown.append(one.name)
      for role, callee in called:
        if callee in times:
          times[callee] += times[name] * (turns or 1 if role in ("body", "condition") else 1)
  return bodies, times, unknown


def _turns(
  loop: _Instruction, called: Mapping[str, str], bodies: Mapping[str, Sequence[_Instruction]]
) -> int | None:
  """Return the trip count of a loop, or None if it is not in the text."""
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  # JAX's scan counts from 0 in steps of 1 up to the only constant in its condition. The
  # comparison may be inside a fusion.
  condition = list(bodies.get(called.get("condition", ""), ()))
  limits = [_LIMIT.match(one.rest) for one in condition if one.operation == "constant"]
  for one in list(condition):
    condition += bodies.get(dict(_CALLED.findall(one.rest)).get("calls", ""), ())
  compares = any("direction=LT" in one.rest for one in condition)
  numbers = [int(limit[1]) for limit in limits if limit]
  return numbers[0] if compares and len(numbers) == 1 else None


def _size(dtype: str, dims: str) -> tuple[int, int]:
  """Return bytes and number of elements of an array such as ("bf16", "8,256")."""
  digits = re.search(r"\d+", dtype)
  bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
  elements = math.prod(int(size) for size in dims.split(",") if size)
  return elements * bits // 8, elements


def _group(attributes: str, devices: int) -> list[int]:
  """Return the devices of the first group, or [] if it contains all devices or is not given."""
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
  """Return the mesh axes along which the positions of these devices differ."""
  if not group:
    return tuple(axis for axis, size in mesh.items() if size > 1)
  if max(group) >= math.prod(mesh.values()):
    return ("?",)
  places = np.array(np.unravel_index(list(group), tuple(mesh.values())))
  return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)
