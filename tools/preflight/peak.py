"""What lives in the temporaries of a compiled step when they hold most.

  compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
  held = at_peak(folder, program)          # the largest first; their bytes add up

The compiler writes where it put each array and from when to when it is needed. Arrays that share a
place (the state of a loop goes in and comes out where it is) count once.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import re

from tools.preflight.hlo import Instruction, Program, arrays_of

# The temporaries in main memory; those of other memories have a colour.
_TEMPORARIES = re.compile(r"allocation \d+: size \d+, preallocated-temp:")
_PLACED = re.compile(
  r"\s+value: <\d+ ([\w.\-]+)(\{[\d,]*\})? .*@0> \(size=(\d+),offset=(\d+)\): (.*)"
)
_LIVES = re.compile(r"\s+([\w.\-]+)(\{[\d,]*\})?:(\d+)-(\d+)$")
_SMALL = 2**16  # bytes; smaller arrays are left out, there are thousands
# What hands on an array that something else made.
_PASSES_ON = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "copy"}


@dataclasses.dataclass(frozen=True)
class Held:
  """One place in memory, and the array in it.

  Attributes:
    bytes: of the place.
    array: its type and shape.
    source: "file:line" of the call that made it; "" where the compiler does not say.
    op_name: where in the traced program it comes from.
  """

  bytes: int
  array: str
  source: str
  op_name: str


@dataclasses.dataclass(frozen=True)
class _Value:
  name: str
  offset: int
  size: int
  shape: str
  start: int
  end: int


def at_peak(folder: Path, program: Program) -> list[Held] | None:
  """The arrays that live when the temporaries hold most, the largest first.

  Args:
    folder: what the compiler wrote for `xla_dump_to`.
    program: the same program; it tells where arrays come from.

  Returns:
    None where the compiler tells it in another way: its files are for people, and may change.
  """
  assignment, live = _only(folder, "*buffer-assignment.txt"), _only(folder, "*live-range.txt")
  if assignment is None or live is None:
    return None
  values = _values(assignment, live)
  values.sort(key=lambda value: (value.offset, -value.size))
  instructions = {i.name: i for i in _instructions(program)}
  moments = sorted({value.start for value in values})  # more can live only where one begins
  places = max((_places(values, moment) for moment in moments), key=_total, default=[])
  held = [_held(place, instructions, program) for place in places]
  return sorted(held, key=lambda one: -one.bytes)


def grouped(held: Sequence[Held], count: int = 12) -> list[tuple[int, str, int, str, str]]:
  """(bytes of one, array, how many, source, op_name) of the `count` largest; equal ones once."""
  numbers: dict[Held, int] = {}
  for one in held:
    numbers[one] = numbers.get(one, 0) + 1
  largest = sorted(numbers, key=lambda one: -one.bytes * numbers[one])[:count]
  return [(one.bytes, one.array, numbers[one], one.source, one.op_name) for one in largest]


def _only(folder: Path, pattern: str) -> str | None:
  """The text of the one file; None where there is none, or several."""
  found = list(folder.glob(pattern))
  return found[0].read_text(encoding="utf-8", errors="replace") if len(found) == 1 else None


def _values(assignment: str, live: str) -> list[_Value]:
  ranges = {}
  for line in live.splitlines():
    if found := _LIVES.match(line):
      ranges[found[1], found[2] or "{}"] = int(found[3]), int(found[4])
  values, inside = [], False
  for line in assignment.splitlines():
    if not line.startswith(" "):
      inside = bool(_TEMPORARIES.match(line))
    elif inside and (found := _PLACED.match(line)):
      name, index, size, offset = found[1], found[2] or "{}", int(found[3]), int(found[4])
      if size >= _SMALL and (name, index) in ranges:
        values.append(_Value(name, offset, size, found[5], *ranges[name, index]))
  return values


def _places(values: Sequence[_Value], time: int) -> list[list[_Value]]:
  """Those alive at a time, values that overlap in memory together; `values` by offset."""
  places: list[list[_Value]] = []
  end = 0
  for value in values:
    if not value.start <= time <= value.end:
      continue
    if places and value.offset < end:
      places[-1].append(value)
    else:
      places.append([value])
    end = max(end, value.offset + value.size)
  return places


def _size(place: Sequence[_Value]) -> int:
  return max(v.offset + v.size for v in place) - min(v.offset for v in place)


def _total(places: Sequence[Sequence[_Value]]) -> int:
  return sum(map(_size, places))


def _held(place: Sequence[_Value], instructions: dict[str, Instruction], program: Program) -> Held:
  """The place told by what made its array, where that is among those who share it."""

  def tells(value: _Value) -> tuple[bool, bool]:
    made = instructions.get(value.name)
    if made is None:
      return False, False
    return bool(made.op_name), made.operation not in _PASSES_ON

  value = max(place, key=tells)
  made = instructions.get(value.name)
  array = max(arrays_of(value.shape), key=lambda a: a.bytes, default="")
  source = program.source(made) if made else ""
  return Held(_size(place), str(array), source, made.op_name if made else "")


def _instructions(program: Program) -> list[Instruction]:
  return [i for instructions in program.computations.values() for i in instructions]
