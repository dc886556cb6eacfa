"""Bidirectional maps between the tensor names of OpenVision and of other libraries.

"Ours" is the parameter tree of ov_models, "theirs" the tensors of the other library. A map lists
every tensor of both sides once: `Entry` if both sides have it, `Fixed` if only theirs stores it and
its value follows from the model, `Dropped` if only ours has it. Unlisted tensors are an error in
both directions; all errors are reported together.

Ours stacks the layers of a tower along a leading axis; theirs has one tensor per layer.
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
  """Invertible transform of a parameter of ov_models (one layer) to a tensor of the other library.

  Attributes:
    name: name for messages and tables.
    axes: permutation of our axes; None for the identity.
    shape: maps our permuted shape to their shape; None for the identity.
  """

  name: str
  axes: tuple[int, ...] | None = None
  shape: Callable[[Shape], Shape] | None = None

  def their_shape(self, ours: Shape) -> Shape:
    """Return their shape for our shape."""
    if self.axes is not None:
      ours = tuple(ours[axis] for axis in self.axes)
    return self.shape(ours) if self.shape else ours

  def forward(self, tensor: np.ndarray) -> np.ndarray:
    """Transform our tensor to theirs."""
    moved = tensor if self.axes is None else tensor.transpose(self.axes)
    return np.ascontiguousarray(moved).reshape(self.their_shape(tensor.shape))

  def back(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
    """Transform their tensor to ours, which has the shape `ours`."""
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
  """One tensor of the other library and our corresponding tensors.

  Attributes:
    theirs: name of the tensor.
    ours: paths of our tensors, with "/" as separator. Several are concatenated along the first axis
      of their tensor.
    transform: transform of each of our tensors.
    layer: index into the leading axis of our stacked tensors, or None.
    also: further transforms that are accepted on import.
  """

  theirs: str
  ours: tuple[str, ...]
  transform: Transform = SAME
  layer: int | None = None
  also: tuple[Transform, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Tensor that only the other library stores: written as `value`, and required to equal it."""

  theirs: str
  value: np.ndarray
  why: str


@dataclasses.dataclass(frozen=True)
class Dropped:
  """Tensor that only ov_models has; a path ending in "/" covers all tensors below it."""

  ours: str
  why: str

  def covers(self, path: str) -> bool:
    return path.startswith(self.ours) if self.ours.endswith("/") else path == self.ours


@dataclasses.dataclass(frozen=True)
class NameMap:
  """All tensors of a model in both naming schemes.

  Attributes:
    target: name of the other library for messages.
    entries, fixed, dropped: see the module docstring.
    ignored: names of their tensors without information, such as buffers, with the reason.
  """

  target: str
  entries: tuple[Entry, ...]
  fixed: tuple[Fixed, ...] = ()
  dropped: tuple[Dropped, ...] = ()
  ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def check_complete(self, config: Any) -> None:
    """Raise ValueError listing all parameters that are neither mapped nor dropped."""
    mapped = {path for entry in self.entries for path in entry.ours}
    extra = [
      path
      for path in flatten(ov_models.abstract_params(config))
      if path not in mapped and not any(drop.covers(path) for drop in self.dropped)
    ]
    if extra:
      raise ValueError(f"{self.target} has no counterpart of {', '.join(sorted(extra))}.")

  def to_theirs(self, params: Params, config: Any) -> Flat:
    """Convert our parameters of `config` to their tensors; dtypes are kept.

    Raises:
      ValueError: if parameters are missing, unexpected or of a wrong shape; lists all of them.
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
    """Convert their tensors to parameters of `config`; dtypes are kept.

    Args:
      flat: tensors by name.
      config: configuration of the model.
      ignore: names of tensors that may be unused.

    Raises:
      ValueError: if tensors are missing, unexpected, of a wrong shape or of a wrong fixed value;
        lists all of them.
    """
    shapes = layer_shapes(config)
    known = {*(e.theirs for e in self.entries), *(f.theirs for f in self.fixed), *self.ignored}
    known |= set(ignore)
    names = [e.theirs for e in self.entries] + [f.theirs for f in self.fixed]
    problems = [f"missing {name}" for name in names if name not in flat]
    problems += [f"unexpected {name} {np.shape(flat[name])}" for name in flat if name not in known]
    problems += [
      problem
      for entry in self.entries
      if entry.theirs in flat
      for problem in _shape_mismatches(entry, np.shape(flat[entry.theirs]), shapes)
    ]
    problems += [
      f"{fixed.theirs} {problem}; {fixed.why}"
      for fixed in self.fixed
      if fixed.theirs in flat
      and (problem := _value_mismatch(np.asarray(flat[fixed.theirs]), fixed.value))
    ]
    if problems:
      raise ValueError(
        f"tensors of {self.target} do not match the config:\n  " + "\n  ".join(problems)
      )

    layers: dict[str, list[np.ndarray]] = {}
    for entry in self.entries:
      theirs = np.asarray(flat[entry.theirs])
      transform = _matching_transform(entry, theirs.shape, shapes)
      for path, part in zip(
        entry.ours, np.split(theirs, len(entry.ours)) if theirs.ndim else [theirs]
      ):
        layers.setdefault(path, []).append(transform.back(part, shapes[path]))
    stacked = {path for entry in self.entries if entry.layer is not None for path in entry.ours}
    return unflatten({p: np.stack(a) if p in stacked else a[0] for p, a in layers.items()})


def _their_shapes(entry: Entry, shapes: Mapping[str, Shape]) -> dict[Shape, Transform]:
  """Return the accepted shapes of `entry`, starting with the one that is written."""
  found: dict[Shape, Transform] = {}
  for transform in (entry.transform, *entry.also):
    first, *rest = transform.their_shape(shapes[entry.ours[0]]) or (None,)
    full = () if first is None else (first * len(entry.ours), *rest)
    found.setdefault(full, transform)
  return found


def _matching_transform(entry: Entry, shape: Shape, shapes: Mapping[str, Shape]) -> Transform:
  return _their_shapes(entry, shapes)[shape]


def _shape_mismatches(entry: Entry, shape: Shape, shapes: Mapping[str, Shape]) -> list[str]:
  wanted = _their_shapes(entry, shapes)
  if shape in wanted:
    return []
  return [f"{entry.theirs} is {shape}, expected {' or '.join(map(str, wanted))}"]


def _value_mismatch(got: np.ndarray, wanted: np.ndarray) -> str:
  """Return how a tensor differs from its fixed value; "" if it is equal."""
  if got.shape != wanted.shape:
    return f"is {got.shape}, expected {wanted.shape}"
  # 2^-8 is the rounding error of bfloat16, in which a file may be stored.
  distance = np.abs(got.astype(np.float32) - wanted).max(initial=0)
  return f"differs by {distance:.1e} from the expected value" if not distance <= 2**-8 else ""


def layer_shapes(config: Any) -> dict[str, Shape]:
  """Return the shapes of our tensors; of one layer if they are stacked."""
  flat = flatten(ov_models.abstract_params(config))
  return {n: s.shape[1:] if "blocks" in n.split("/") else s.shape for n, s in flat.items()}


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
  """Return the leaves of a nested dict by path, with "/" as separator.

  Examples:
    >>> from ov_convert import name_map
    >>> name_map.flatten({"encoder": {"kernel": 1, "bias": 2}})
    {'encoder/kernel': 1, 'encoder/bias': 2}
  """
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}/")
    else:
      flat[prefix + name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
  """Return the nested dict of leaves by path; the inverse of `flatten`.

  Examples:
    >>> from ov_convert import name_map
    >>> name_map.unflatten({"encoder/kernel": 1, "encoder/bias": 2})
    {'encoder': {'kernel': 1, 'bias': 2}}
  """
  tree: Params = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = value
  return tree


def size(flat: Mapping[str, Any]) -> int:
  """Return the total number of elements of tensors by name."""
  return sum(math.prod(np.shape(tensor)) for tensor in flat.values())
