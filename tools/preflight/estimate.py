"""What a train step takes of one device's memory, by arithmetic on its traced program.

  found = estimate(functools.partial(plan_of, config))      # config of n images -> Plan
  found.peak(64)                     # bytes: state, batch and temporaries for 64 images
  found.largest(80 * 10**9)          # images
  kept_bytes(...)                    # what the forward pass keeps of an image for the backward pass

No compiler is asked, so it holds for cards that are not here. The order of the traced program is
taken for the order of execution. Every array lives from where it is made to its last use, with
three things that compilers do: element-wise operations join those that use them and need no array
of their own, unless a product reads it, or two places use it and it is costly to make; the state of
a loop, its stacked results and the new train state are written in place; a result takes the place
of an operand of its size that ends there. Gradients of stacked layers have their place from the
start, for it is filled with zeros before the loop.
A program is traced for two sizes of batch, and every array is taken to grow evenly between.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
from jax.extend import core
import numpy as np

from apps.trainer.augment import make_preprocess
from apps.trainer.config import augment_config
from apps.trainer.parts import build_step
import ov_models
from tools.preflight.compile import Plan, tree_bytes

_IMAGES = (8, 16)  # batches that are traced
# Work on each entry by itself, and views: a compiler makes it where the result is used.
_JOINS = {
  "abs", "add", "add_any", "and", "bitcast_convert_type", "broadcast_in_dim", "cbrt", "ceil",
  "clamp", "concatenate", "convert_element_type", "copy", "cos", "device_put", "div",
  "dynamic_slice", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expand_dims", "expm1", "floor",
  "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
  "min", "mul", "name", "ne", "neg", "not", "optimization_barrier", "or", "pad", "pow",
  "random_bits", "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap",
  "reduce_precision", "rem", "reshape", "rev", "round", "rsqrt", "select_n", "sharding_constraint",
  "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "slice", "split",
  "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "threefry2x32", "transpose", "xor",
}  # fmt: skip
# Of these, much work for each entry.
_COSTLY = {
  "cbrt", "cos", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "log", "log1p",
  "logistic", "pow", "random_bits", "rem", "rsqrt", "sin", "sqrt", "tanh", "threefry2x32",
}  # fmt: skip
_LOOPS = {"scan", "while", "cond"}
# What reads arrays, not what would make them.
_READS = _LOOPS | {"conv_general_dilated", "cumsum", "dot_general", "gather", "sort"}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Memory of one device as a function of its images.

  Attributes:
    state: bytes of the train state.
    image: bytes of an image and its texts, as they arrive.
    fixed: bytes of temporaries at each moment of the step [n], whatever the batch.
    per_image: bytes of temporaries at each moment for each image [n].
  """

  state: int
  image: int
  fixed: np.ndarray
  per_image: np.ndarray

  def temporaries(self, images: int, share: float = 1) -> int:
    """Bytes beside state and batch when they are most.

    Args:
      images: of the device.
      share: of what is there whatever the batch, where several devices divide it.
    """
    return int(np.max(self.fixed * share + self.per_image * images))

  def peak(self, images: int) -> int:
    """Bytes of all."""
    return self.state + self.image * images + self.temporaries(images)

  def largest(self, limit: float) -> int:
    """Most images whose peak is within `limit` bytes; 0 where not even one's is."""
    room = limit - self.state - self.fixed
    return max(int(np.min(room / (self.per_image + self.image))), 0)


def estimate(make_plan: Callable[[int], Plan]) -> Estimate:
  """The memory of a step on one device.

  Args:
    make_plan: number of images -> the abstract step on one device.

  Raises:
    ValueError: the program for another number of images is not the same but for its sizes.
  """
  plans = [make_plan(images) for images in _IMAGES]
  fixed, per_image = _evenly(live_bytes([_trace(plan) for plan in plans]))
  state, images = tree_bytes(plans[0].parts.abstract), [tree_bytes(plan.batch) for plan in plans]
  return Estimate(state, int(_evenly(np.asarray(images))[1]), fixed, per_image)


def live_bytes(programs: Sequence[core.Jaxpr]) -> np.ndarray:
  """What lives beside arguments and results at each moment of a program.

  Args:
    programs: the same, traced for different sizes.

  Returns:
    float64 [number of programs, moments].

  Raises:
    ValueError: they are not the same but for sizes.
  """
  walk = _Walk(len(programs))
  walk.run(programs, np.zeros(len(programs)), ())
  return np.stack(walk.moments, axis=1)


def kept_bytes(make_plan: Callable[[int], Plan]) -> tuple[float, float]:
  """Bytes that the forward pass keeps of one image for the backward pass: on device and host.

  Args:
    make_plan: number of images -> the abstract step on one device.
  """
  found = np.asarray([_kept(make_plan(images)) for images in _IMAGES])
  on_device, on_host = _evenly(found)[1]
  return float(on_device), float(on_host)


def _kept(plan: Plan) -> tuple[int, int]:
  """Bytes of what the derivative of the loss holds: on device, on host; params included."""
  preprocess = make_preprocess(augment_config(plan.config), plan.config.seed)

  def forward(params: Any, batch: dict[str, jax.Array]) -> Any:
    def loss(params: Any) -> Any:
      out = plan.parts.task.loss(params, preprocess(batch), jax.random.key(0))
      return out.loss, out

    return jax.vjp(loss, params, has_aux=True)[1]

  with ov_models.on_mesh(plan.mesh):
    program = jax.make_jaxpr(forward)(plan.parts.abstract["params"], plan.batch).jaxpr
  kept = {id(v): v.aval for v in program.outvars if not isinstance(v, core.Literal)}.values()
  on_host = sum(_bytes(aval) for aval in kept if _on_host(aval))
  return sum(map(_bytes, kept)) - on_host, on_host


def _trace(plan: Plan) -> core.Jaxpr:
  step = build_step(plan.config, plan.parts, plan.mesh, plan.index)
  with ov_models.on_mesh(plan.mesh):
    return step.trace(plan.parts.abstract, plan.batch).jaxpr.jaxpr


def _evenly(found: np.ndarray) -> tuple[Any, Any]:
  """What is there without an image, and what comes with each, from figures for `_IMAGES`."""
  per_image = (found[1] - found[0]) / (_IMAGES[1] - _IMAGES[0])
  return found[0] - _IMAGES[0] * per_image, per_image


def _bytes(aval: Any) -> int:
  return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "dtype") else 0


def _on_host(aval: Any) -> bool:
  return getattr(aval, "memory_space", None) == jax.memory.Space.Host


@dataclasses.dataclass(eq=False)
class _Array:
  """A value of the program.

  Attributes:
    bytes: on the device, for each size of batch.
    light: made of few numbers, as a broadcast is.
  """

  bytes: np.ndarray
  light: bool = False


_LITERAL = _Array(np.zeros(()), light=True)


@dataclasses.dataclass(frozen=True)
class _Operation:
  """The same operation in the programs of both sizes."""

  equations: Sequence[Any]
  operands: Sequence[_Array]
  results: Sequence[_Array]

  @property
  def name(self) -> str:
    return self.equations[0].primitive.name

  @property
  def costly(self) -> bool:
    """Whether it is not made twice: much work, or several arrays to read."""
    shape = self.equations[0].outvars[0].aval.shape
    read = zip(self.equations[0].invars, self.operands, strict=True)
    arrays = [v for v, array in read if v.aval.shape == shape and not array.light]
    return self.name in _COSTLY or len(arrays) > 1

  @property
  def narrows(self) -> bool:
    """Whether it rounds: who needs the exact value beside makes it anew from the same arrays."""
    if self.name != "convert_element_type":
      return False
    return bool((self.operands[0].bytes > self.results[0].bytes).all())


class _Walk:
  """Goes through a program and writes down what lives at each moment: `moments`."""

  def __init__(self, sizes: int) -> None:
    self._nothing = np.zeros(sizes)
    self.moments = [self._nothing]

  def run(
    self, programs: Sequence[core.Jaxpr], outside: np.ndarray, slices: Sequence[np.ndarray]
  ) -> None:
    """One program, of the step or inside a loop.

    Args:
      programs: for each size of batch.
      outside: bytes that live around it.
      slices: bytes of its last arguments, which it takes out of stacked arrays; all other
        arguments are arrays that live outside.
    """
    arguments = [_Array(self._nothing) for _ in _arguments(programs[0])]
    values = dict(zip(_arguments(programs[0]), arguments, strict=True))
    operations = _in_order(list(_operations(programs, values)))
    results = _read(programs[0].outvars, values)
    last, joined, read = _uses(operations, results)
    alive: dict[_Array, None] = {}

    def begin(arrays: Iterable[_Array]) -> None:
      alive.update(dict.fromkeys(a for a in arrays if a in last and a not in joined))

    def now() -> np.ndarray:
      return sum((array.bytes for array in alive), outside)

    for array, size in zip(arguments[len(arguments) - len(slices) :], slices, strict=True):
      if array in read:
        array.bytes = size
        begin([array])
    begin(itertools.chain.from_iterable(map(_prepared, operations)))
    for place, operation in enumerate(operations):
      fresh = [array for array in operation.results if array in last and array not in joined]
      if not fresh:
        continue
      for array in list(fresh):
        for old in _replaced(operation, array, [a for a in alive if last[a] == place]):
          del alive[old]
          alive[array] = None
          fresh.remove(array)
      begin(fresh)
      self.moments.append(now())
      for inner, taken in _inside(operation):
        self.run(inner, now(), taken)
      for array in [array for array in alive if last[array] <= place]:
        del alive[array]


def _arguments(program: core.Jaxpr) -> list[Any]:
  return [*program.constvars, *program.invars]


def _read(variables: Iterable[Any], values: dict[Any, _Array]) -> list[_Array]:
  return [_LITERAL if isinstance(v, core.Literal) else values[v] for v in variables]


def _operations(programs: Sequence[core.Jaxpr], values: dict[Any, _Array]) -> Iterator[_Operation]:
  """In order, with those of called functions in place of the calls; completes `values`."""
  for equations in zip(*(program.eqns for program in programs), strict=True):
    first = equations[0]
    if len({equation.primitive for equation in equations}) > 1:
      raise ValueError("the programs of two sizes of batch differ in more than sizes")
    operands = _read(first.invars, values)
    called = [_called(equation) for equation in equations]
    if called[0] is not None and first.primitive.name not in _LOOPS:
      own = dict(zip(called[0].invars, operands, strict=True))
      own |= dict.fromkeys(called[0].constvars, _LITERAL)
      yield from _operations(called, own)
      results = _read(called[0].outvars, own)
    else:
      sizes = np.array([[_device_bytes(v.aval) for v in e.outvars] for e in equations], float)
      light = first.primitive.name in _JOINS and all(array.light for array in operands)
      light |= first.primitive.name in ("broadcast_in_dim", "iota")
      results = [_Array(size, light) for size in sizes.T]
      yield _Operation(equations, operands, results)
    values |= dict(zip(first.outvars, results, strict=True))


def _in_order(operations: Sequence[_Operation]) -> list[_Operation]:
  """With sums, and what may join them, as soon as they can be made: they are small."""
  made: dict[_Array, int] = {}
  places = []
  for place, operation in enumerate(operations):
    if operation.name.startswith("reduce_") or (operation.name in _JOINS and not operation.costly):
      place = max((made.get(array, 0) for array in operation.operands), default=0)
    made |= dict.fromkeys(operation.results, place)
    places.append(place)
  return [operations[i] for i in sorted(range(len(operations)), key=places.__getitem__)]


def _device_bytes(aval: Any) -> int:
  return 0 if _on_host(aval) else _bytes(aval)


def _called(equation: Any) -> Any:
  """The program that an operation runs once; None where there is none."""
  for name in ("jaxpr", "call_jaxpr"):
    if name in equation.params:
      program = equation.params[name]
      return getattr(program, "jaxpr", program)
  return None


def _uses(
  operations: Sequence[_Operation], results: Sequence[_Array]
) -> tuple[dict[_Array, int], set[_Array], set[_Array]]:
  """(array -> place of its last use; arrays that join their users; arrays that are read as such).

  An array without a use is not in the first. What joins its users uses its operands where they are.
  """
  last = dict.fromkeys(results, len(operations))
  places: dict[_Array, set[Any]] = {array: {array} for array in results}  # where it is made
  joined: set[_Array] = set()
  read: set[_Array] = set()
  for place, operation in reversed(list(enumerate(operations))):
    used = [array for array in operation.results if array in last]
    if not used:
      continue
    when, where = place, {place}
    if operation.name in _LOOPS:  # it has its state, whether its last value is used or not
      last |= {array: place for array in operation.results if array not in last}
    if operation.name in _JOINS and read.isdisjoint(used):
      users = set().union(*(places[array] for array in used))
      if len(users) <= 1 or not operation.costly:
        joined.update(used)
        when, where = max(last[array] for array in used), users
        if operation.narrows:
          where = set()
    for array in operation.operands:
      last[array] = max(last.get(array, -1), when)
      places.setdefault(array, set()).update(where)
      if operation.name in _READS:
        read.add(array)
  return last, joined, read


def _replaced(operation: _Operation, result: _Array, ending: Sequence[_Array]) -> Sequence[_Array]:
  """The array whose place a result takes, of those that end with the operation; or none."""
  if operation.name == "scan":
    params, place = operation.equations[0].params, operation.results.index(result)
    if place >= params["num_carry"]:
      return []
    state = operation.operands[params["num_consts"] + place]
    ending = [array for array in ending if array is state]
  elif operation.name not in _JOINS:
    return []
  return [array for array in ending if (array.bytes == result.bytes).all()][:1]


def _prepared(operation: _Operation) -> list[_Array]:
  """What is made long before the operation: zeros, where a loop over layers puts gradients.

  They depend on nothing, so a compiler may; only what does not grow with the batch is counted so.
  """
  if operation.name != "scan":
    return []
  stacked = operation.results[operation.equations[0].params["num_carry"] :]
  return [array for array in stacked if (array.bytes == array.bytes[0]).all()]


def _inside(operation: _Operation) -> Iterator[tuple[list[core.Jaxpr], list[np.ndarray]]]:
  """The programs inside a loop or a choice, each with the bytes of the slices it takes."""
  params = [equation.params for equation in operation.equations]
  if operation.name == "scan":
    bodies = [p["jaxpr"].jaxpr for p in params]
    first = params[0]["num_consts"] + params[0]["num_carry"]
    sizes = [[_device_bytes(v.aval) for v in body.invars[first:]] for body in bodies]
    yield bodies, list(np.array(sizes, float).T)
  elif operation.name == "while":
    yield [p["body_jaxpr"].jaxpr for p in params], []
  elif operation.name == "cond":
    for branches in zip(*(p["branches"] for p in params), strict=True):
      yield [branch.jaxpr for branch in branches], []
