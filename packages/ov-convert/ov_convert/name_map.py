"""Name maps: which tensor of theirs is which of ours, as data that is read in both directions.

A map lists every tensor of both sides once: `Entry` where both have it, `Fixed` where only theirs
stores it and its value follows from the model, `Dropped` where only ours has it. What is not listed
is an error on the way in and on the way out, and all errors are told together.

Ours stacks the layers of a tower along a leading axis; theirs has a tensor for each layer.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

import ov_models

Params = dict[str, Any]
Flat = dict[str, np.ndarray]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a tensor of ours (of one layer) becomes theirs; the way back undoes it.

  Attributes:
    name: for messages and tables.
    axes: the order of our axes in theirs; None keeps it.
    shape: shape of theirs from that of ours with its axes in order; None keeps it.
  """

  name: str
  axes: tuple[int, ...] | None = None
  shape: Callable[[Shape], Shape] | None = None

  def their_shape(self, ours: Shape) -> Shape:
    """Shape of theirs for `ours`."""
    if self.axes is not None:
      ours = tuple(ours[axis] for axis in self.axes)
    return self.shape(ours) if self.shape else ours

  def forward(self, tensor: np.ndarray) -> np.ndarray:
    """Ours to theirs."""
    moved = tensor if self.axes is None else tensor.transpose(self.axes)
    return np.ascontiguousarray(moved).reshape(self.their_shape(tensor.shape))

  def back(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
    """Theirs to `ours`, the shape of ours."""
    if self.axes is None:
      return tensor.reshape(ours)
    moved = tensor.reshape([ours[axis] for axis in self.axes])
    return np.ascontiguousarray(moved.transpose(np.argsort(self.axes)))


SAME = Transform("same")
TRANSPOSE = Transform("transpose", axes=(1, 0))
CONV = Transform("conv HWIO to OIHW", axes=(3, 2, 0, 1))
LEAD_1 = Transform("leading 1", shape=lambda s: (1, *s))
LEAD_1_1 = Transform("leading 1, 1", shape=lambda s: (1, 1, *s))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs and what it is of ours.

  Attributes:
    theirs: their name.
    ours: our paths, joined by "/". Several are parts of theirs, one after the other along its
      first axis.
    transform: of each part.
    layer: index into the leading axis of our stacked tensors, or None.
    also: other transforms that are accepted on the way in.
  """

  theirs: str
  ours: tuple[str, ...]
  transform: Transform = SAME
  layer: int | None = None
  also: tuple[Transform, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fixed:
  """A tensor of theirs that ours does not store: `value` is written, and demanded on the way in."""

  theirs: str
  value: np.ndarray
  why: str


@dataclasses.dataclass(frozen=True)
class Dropped:
  """A tensor of ours, or all below a path that ends in "/", that theirs has no place for."""

  ours: str
  why: str

  def covers(self, path: str) -> bool:
    return path.startswith(self.ours) if self.ours.endswith("/") else path == self.ours


@dataclasses.dataclass(frozen=True)
class NameMap:
  """Every tensor of a model in both worlds.

  Attributes:
    target: what theirs is called in messages.
    entries, fixed, dropped: see the module.
    ignored: names of theirs that carry nothing, such as buffers, with the reason.
  """

  target: str
  entries: tuple[Entry, ...]
  fixed: tuple[Fixed, ...] = ()
  dropped: tuple[Dropped, ...] = ()
  ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def check_complete(self, config: Any) -> None:
    """Raises ValueError, listing them, where parameters are neither mapped nor dropped."""
    mapped = {path for entry in self.entries for path in entry.ours}
    extra = [
      path
      for path in flatten(ov_models.abstract_params(config))
      if path not in mapped and not any(drop.covers(path) for drop in self.dropped)
    ]
    if extra:
      raise ValueError(f"{self.target} has no counterpart of {', '.join(sorted(extra))}.")

  def to_theirs(self, params: Params, config: Any) -> Flat:
    """Our parameters of `config` under their names; dtypes unchanged.

    Raises:
      ValueError: parameters missing, left over or of a wrong shape; all are listed.
    """
    ov_models.bind(config, params)  # checks names and shapes
    self.check_complete(config)
    ours = flatten(params)
    flat: Flat = {}
    for entry in self.entries:
      parts = [np.asarray(ours[path]) for path in entry.ours]
      if entry.layer is not None:
        parts = [part[entry.layer] for part in parts]
      parts = [entry.transform.forward(part) for part in parts]
      flat[entry.theirs] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return flat | {fixed.theirs: fixed.value for fixed in self.fixed}

  def to_ours(self, flat: Mapping[str, Any], config: Any, ignore: Iterable[str] = ()) -> Params:
    """Their tensors as parameters of `config`, dtypes unchanged.

    Args:
      flat: tensors by name.
      config: which model they are.
      ignore: names that may be left over.

    Raises:
      ValueError: tensors missing, left over, of a wrong shape or not of the value that the model
        needs; all are listed.
    """
    shapes = layer_shapes(config)
    known = {*(e.theirs for e in self.entries), *(f.theirs for f in self.fixed), *self.ignored}
    known |= set(ignore)
    names = [e.theirs for e in self.entries] + [f.theirs for f in self.fixed]
    problems = [f"missing {name}" for name in names if name not in flat]
    problems += [f"left over {name} {np.shape(flat[name])}" for name in flat if name not in known]
    problems += [
      problem
      for entry in self.entries
      if entry.theirs in flat
      for problem in _misfit(entry, np.shape(flat[entry.theirs]), shapes)
    ]
    problems += [
      f"{fixed.theirs} {problem}; {fixed.why}"
      for fixed in self.fixed
      if fixed.theirs in flat and (problem := _differs(np.asarray(flat[fixed.theirs]), fixed.value))
    ]
    if problems:
      raise ValueError(
        f"tensors of {self.target} do not fit the config:\n  " + "\n  ".join(problems)
      )

    layers: dict[str, list[np.ndarray]] = {}
    for entry in self.entries:
      theirs = np.asarray(flat[entry.theirs])
      transform = _matching(entry, theirs.shape, shapes)
      for path, part in zip(
        entry.ours, np.split(theirs, len(entry.ours)) if theirs.ndim else [theirs]
      ):
        layers.setdefault(path, []).append(transform.back(part, shapes[path]))
    stacked = {path for entry in self.entries if entry.layer is not None for path in entry.ours}
    return unflatten({p: np.stack(a) if p in stacked else a[0] for p, a in layers.items()})


def _their_shapes(entry: Entry, shapes: Mapping[str, Shape]) -> dict[Shape, Transform]:
  """The shapes in which `entry` is accepted, the one that is written first."""
  found: dict[Shape, Transform] = {}
  for transform in (entry.transform, *entry.also):
    first, *rest = transform.their_shape(shapes[entry.ours[0]]) or (None,)
    whole = () if first is None else (first * len(entry.ours), *rest)
    found.setdefault(whole, transform)
  return found


def _matching(entry: Entry, shape: Shape, shapes: Mapping[str, Shape]) -> Transform:
  return _their_shapes(entry, shapes)[shape]


def _misfit(entry: Entry, shape: Shape, shapes: Mapping[str, Shape]) -> list[str]:
  wanted = _their_shapes(entry, shapes)
  if shape in wanted:
    return []
  return [f"{entry.theirs} is {shape}, expected {' or '.join(map(str, wanted))}"]


def _differs(got: np.ndarray, wanted: np.ndarray) -> str:
  """What is wrong with a tensor of one permitted value; "" if nothing is."""
  if got.shape != wanted.shape:
    return f"is {got.shape}, expected {wanted.shape}"
  # Files may hold 16 bits of it: 2^-8 is the rounding of bfloat16.
  distance = np.abs(got.astype(np.float32) - wanted).max(initial=0)
  return f"differs by {distance:.1e} from what it must be" if not distance <= 2**-8 else ""


def layer_shapes(config: Any) -> dict[str, Shape]:
  """Shape of each of our tensors, of one layer where stacked."""
  flat = flatten(ov_models.abstract_params(config))
  return {n: s.shape[1:] if "blocks" in n.split("/") else s.shape for n, s in flat.items()}


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
  """Leaves by their path, joined by "/"."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}/")
    else:
      flat[prefix + name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
  """The inverse of `flatten`."""
  tree: Params = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = value
  return tree


def size(flat: Mapping[str, Any]) -> int:
  """Number of values in tensors by name."""
  return sum(math.prod(np.shape(tensor)) for tensor in flat.values())
