"""How fast a step can be at best, and what a schedule then costs.

  traffic(program)      bytes of main memory that the compiled step reads and writes
  bound(...)            the longest of: products at peak, memory at full width, links at full width

No step is faster. Real ones are slower: parts do not overlap wholly, products do not reach the
peak. The compiler's own estimates are not used: its count of operations sees a loop once, and its
time came out negative for every transformer tried.
"""

from collections.abc import Mapping, Sequence
import dataclasses

from tools.preflight.hlo import Instruction, Program
from tools.preflight.topology import Chip

# What forward work is done again in the backward pass, on top of the model's three passes.
_AGAIN = {"full": 1.0, "offload": 0.0, "dots": 0.0, "none": 0.0}

_NOT_MOVED = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant",
  "after-all", "partition-id", "optimization-barrier", "custom-call",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds of one step at best, and what holds it there."""

  compute: float
  memory: float | None  # None: nothing was compiled, so the traffic is not known
  links: float | None

  @property
  def seconds(self) -> float:
    return max(self.compute, self.memory or 0.0, self.links or 0.0)

  @property
  def limit(self) -> str:
    parts = {"products": self.compute, "memory": self.memory or 0.0, "links": self.links or 0.0}
    return max(parts, key=lambda name: parts[name])


def executed_flops(model_flops: float, remat: str) -> float:
  """FLOPs of one example with what is computed twice: a whole forward pass where remat is full.

  The model's are forward and backward, of which the forward pass is a third. Products that "dots"
  and "offload" make again (those of attention) are left out.
  """
  return model_flops * (1 + _AGAIN[remat] / 3)


def bound(
  chip: Chip,
  *,
  flops_per_device: float,
  moved: float | None = None,
  sent: float | None = None,
) -> Bound:
  """The bound of a step on one chip.

  Args:
    chip: its peaks. Products run in bfloat16 passes even on float32 arrays, jax's default on TPUs.
    flops_per_device: executed in one step.
    moved: bytes to and from main memory in one step.
    sent: bytes a device sends in one step, over all of its links at once.
  """
  return Bound(
    flops_per_device / chip.peak_flops,
    None if moved is None else moved / chip.hbm_bandwidth,
    None if sent is None else sent / chip.ici_bandwidth,
  )


def traffic(program: Program) -> int:
  """Bytes that one step moves to and from the main memory of a device, as its text tells.

  Every result is written once and every operand read once. Where an operation takes a part of an
  array, the part counts: slices of stacked layers, updates in place. On-chip memory is free.
  """
  total = 0
  where = {i.name: i for body in program.computations.values() for i in body}
  for instruction, times in program.executed():
    if instruction.operation in _NOT_MOVED or instruction.operation.endswith(("-done", "-update")):
      continue
    total += times * _moved(instruction, where, program)
  return total


def _moved(one: Instruction, where: Mapping[str, Instruction], program: Program) -> int:
  operands = [where[name] for name in one.operands if name in where]
  if one.operation.endswith("-start"):
    if len(one.arrays) < 2:
      return one.bytes
    size = min(array.bytes for array in one.arrays[:2])  # a copy, or a part of the first
    return sum(size for array in one.arrays[:2] if array.space == 0)
  if one.operation in ("dynamic-slice", "slice", "gather"):
    return 2 * one.bytes
  if one.operation == "dynamic-update-slice":
    return 2 * operands[1].bytes
  if one.operation == "fusion":
    called = program.computations.get(_called(one), ())
    if called:
      return _fusion(one, operands, called, program)
  return one.bytes + sum(operand.bytes for operand in operands)


def _fusion(
  one: Instruction, operands: Sequence[Instruction], inside: Sequence[Instruction], program: Program
) -> int:
  total = 0
  for parameter in inside:
    if parameter.operation == "parameter":
      operand = operands[int(parameter.literal)]
      part = _part(parameter, inside, program)
      total += operand.bytes if part is None else min(part, operand.bytes)
  root = next(i for i in inside if i.is_root)
  updates = _updates(root, {i.name: i for i in inside})
  return total + (sum(updates) or one.bytes)  # in place: only the new part is written


def _part(value: Instruction, inside: Sequence[Instruction], program: Program) -> int | None:
  """Bytes that a fusion reads of one value, where it takes slices of it only; else None."""
  total = 0
  for user in inside:
    for place, name in enumerate(user.operands):
      if name != value.name:
        continue
      part: int | None = None
      if user.operation == "bitcast":
        part = _part(user, inside, program)
      elif user.operation in ("dynamic-slice", "slice", "gather") and place == 0:
        part = sum(array.bytes for array in user.arrays)
      elif user.operation == "dynamic-update-slice" and place == 0:
        part = 0
      elif user.operation == "fusion":
        called = program.computations.get(_called(user), ())
        inner = next((i for i in called if i.literal == str(place)
                      and i.operation == "parameter"), None)  # fmt: skip
        part = _part(inner, called, program) if inner else None
      if part is None:
        return None
      total += part
  return total


def _updates(root: Instruction, made: Mapping[str, Instruction]) -> list[int]:
  """Bytes written by a fusion whose every result is an update in place; [] for others."""
  results = [made[n] for n in root.operands if n in made] if root.operation == "tuple" else [root]
  sizes = []
  for result in results:
    while result.operation == "bitcast" and result.operands[0] in made:
      result = made[result.operands[0]]
    if result.operation != "dynamic-update-slice":
      return []
    sizes.append(sum(array.bytes for array in made[result.operands[1]].arrays))
  return sizes


def _called(one: Instruction) -> str:
  return one.attributes.partition("calls=%")[2].partition(",")[0].split(" ")[0]
