"""Reads the text of a compiled program: instructions, how often each runs, sizes of arrays.

  program = parse(compiled.as_text())
  for instruction, times in program.executed():
    ...

Loops count as often as they turn. Sizes are those of the entries: tiles of a TPU layout that are
filled up are not counted. Only what the text says is used; where it does not tell how often a loop
turns, it counts once and is listed in `unknown_loops`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")
_SPACE = re.compile(r"S\((\d+)\)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_LOCATION = re.compile(r"file_name_id=(\d+).* line=(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape; `space` 0 is the main memory of the device."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> int:
    digits = re.search(r"\d+", self.dtype)
    bits = 8 if self.dtype == "pred" else int(digits[0]) if digits else 0
    return math.prod(self.dims) * bits // 8

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  operation: str
  arrays: tuple[Array, ...]  # of its result, in order
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  literal: str  # what stands between the brackets of a constant or parameter

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from, as jax names it."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def bytes(self) -> int:
    """Of its result, in the main memory of the device."""
    return sum(array.bytes for array in self.arrays if array.space == 0)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module. `computations` are in the order of the text: what is called comes first."""

  computations: dict[str, list[Instruction]]
  entry: str
  frames: Mapping[int, str]  # stack frame -> "file:line"

  @functools.cached_property
  def _walk(self) -> tuple[dict[str, int], set[str], list[str]]:
    """How often each computation runs, which are inside a fusion or reduction, unknown loops."""
    times = dict.fromkeys(self.computations, 0) | {self.entry: 1}
    inner: set[str] = set()
    unknown = []
    for name in reversed(self.computations):
      for instruction in self.computations[name]:
        if instruction.operation.endswith(("-done", "-update")):
          continue
        turns = 1
        if instruction.operation == "while":
          found = self._turns(instruction)
          if found is None:
            unknown.append(instruction.name)
          turns = found or 1
        for role, called in _calls(instruction):
          if called not in times:
            continue
          times[called] += times[name] * (turns if role in ("body", "condition") else 1)
          if name in inner or role == "to_apply" or instruction.operation == "fusion":
            inner.add(called)
    return times, inner, unknown

  @property
  def unknown_loops(self) -> list[str]:
    return self._walk[2]

  def executed(self, *, inside: bool = False) -> Iterator[tuple[Instruction, int]]:
    """Instructions with how often each runs in one call of the program.

    Args:
      inside: also those inside fusions, whose results never reach memory.
    """
    times, inner, _ = self._walk
    for name, instructions in self.computations.items():
      if times[name] and (inside or name not in inner):
        for instruction in instructions:
          yield instruction, times[name]

  def source(self, instruction: Instruction) -> str:
    """ "file:line" of the call that made it; "" where the text does not say."""
    frame = _FRAME.search(instruction.attributes)
    if frame:
      return self.frames.get(int(frame[1]), "")
    file = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
    return f"{file[1]}:{file[2]}" if file else ""

  def _turns(self, loop: Instruction) -> int | None:
    if known := _TRIPS.search(loop.attributes):
      return int(known[1])
    condition = self.computations.get(dict(_calls(loop)).get("condition", ""), ())
    constants = {i.name: i.literal for i in condition if i.operation == "constant"}
    limits = [literal for literal in constants.values() if literal.isdecimal()]
    root = next((i for i in condition if i.is_root), None)
    # A scan of jax counts from 0 up by 1, and ends at the one constant it is compared with.
    if root is None or len(limits) != 1 or "direction=LT" not in self._comparison(root):
      return None
    return int(limits[0])

  def _comparison(self, root: Instruction) -> str:
    if root.operation == "fusion":
      called = dict(_calls(root)).get("calls", "")
      return " ".join(i.attributes for i in self.computations.get(called, ()))
    return root.attributes


def parse(text: str) -> Program:
  """The program of an HLO text, as `compiled.as_text()` gives it.

  Raises:
    ValueError: there is no entry computation in it.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if current is None or not line.startswith(" "):
      if head := _COMPUTATION.match(line):
        current = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      current.append(_instruction(found[2], found[3], bool(found[1])))
  if not entry:
    raise ValueError("no entry computation in this text; expected that of a compiled program.")
  return Program(computations, entry, _frames(text))


def arrays_of(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape such as "(f32[2,3]{1,0:T(8,128)S(1)}, s32[])"."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = _SPACE.search(layout)
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    found.append(Array(dtype, sizes, int(space[1]) if space else 0))
  return tuple(found)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:]
  operation = _OPERATION.match(rest)
  if operation is None:
    raise ValueError(f"cannot read the instruction %{name}: {rest[:80]!r}")
  close = _closing(rest, operation.end() - 1)
  inside = rest[operation.end() : close]
  return Instruction(
    name,
    operation[1],
    arrays_of(shape),
    tuple(_NAME.findall(inside)),
    rest[close + 1 :],
    is_root,
    inside if operation[1] in ("constant", "parameter") else "",
  )


def _closing(text: str, start: int) -> int:
  """Index of the bracket that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[index], 0)
    if depth == 0:
      return index
  return len(text)


def _calls(instruction: Instruction) -> list[tuple[str, str]]:
  """(role, computation) for each that an instruction calls."""
  found = [(role, name) for role, name in _CALLED.findall(instruction.attributes)]
  for names in _BRANCHES.findall(instruction.attributes):
    found += [("branch", name) for name in re.findall(r"[\w.\-]+", names)]
  return found


def _frames(text: str) -> dict[int, str]:
  """The tables of files and lines at the head of newer texts."""
  tables: dict[str, dict[int, str]] = {}
  table: dict[int, str] = {}
  for line in text.splitlines():
    if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      table = tables.setdefault(line, {})
    elif line.startswith(("%", "ENTRY")):
      break
    elif row := re.match(r"(\d+) (.*)", line):
      table[int(row[1])] = row[2]
  places = {}
  for number, fields in tables.get("FileLocations", {}).items():
    if found := _LOCATION.search(fields):
      file = tables["FileNames"].get(int(found[1]), "").strip('"')
      places[number] = f"{file}:{found[2]}"
  frames = {}
  for number, fields in tables.get("StackFrames", {}).items():
    if place := re.search(r"file_location_id=(\d+)", fields):
      frames[number] = places.get(int(place[1]), "")
  return frames
