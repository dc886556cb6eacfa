"""From logical axis names to shardings.

A model names the dimensions of each parameter (`("embed", "mlp")`); rules map each name to mesh
axes; the result is one `NamedSharding` per array. Models so stay free of any mesh.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes, in order. An empty tuple keeps the dimension whole.
DEFAULT_RULES: Rules = MappingProxyType(
  {
    "activation_batch": ("data", "fsdp"),
    "activation_length": (),
    "activation_embed": ("tensor",),
    "activation_heads": ("tensor",),
    "activation_kv": ("tensor",),
    "activation_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": (),
    "layers": (),
    "mlp": ("tensor",),
    "norm": ("tensor",),
    "vocab": ("tensor",),
  }
)

LAYERS = "layers"  # the stacked axis of a scan: never split by the fallback


@dataclasses.dataclass(frozen=True)
class Placement:
  """How one array is placed, and which of its dimensions a rule could not split."""

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype
  spec: PartitionSpec
  notes: tuple[str, ...]


def tree_shardings(
  axes: Any,
  shapes: Any,
  mesh: Mesh,
  rules: Rules = DEFAULT_RULES,
  *,
  fsdp_fallback: int | None = None,
) -> Any:
  """One `NamedSharding` for each array of a tree.

  A dimension that its mesh axes do not divide, or whose mesh axes an earlier dimension of the same
  array already uses, stays whole; this is logged as a warning and listed by `describe_shardings`.

  Args:
    axes: tree of tuples, one logical name or None (whole) per dimension.
    shapes: the same tree of arrays or `jax.ShapeDtypeStruct`s.
    mesh: the devices.
    rules: logical name -> mesh axes.
    fsdp_fallback: if given, an array of at least this many elements that the rules leave whole is
      split over `fsdp` along its largest divisible dimension other than the layer axis.

  Raises:
    ValueError: on a name without a rule, a rule with an unknown mesh axis, or trees that differ;
      the message names the path of the parameter.
  """
  placements = _place(axes, shapes, mesh, rules, fsdp_fallback)
  for placement in placements:
    for note in placement.notes:
      logger.warning("%s %s: %s", placement.path, placement.shape, note)
  shardings = [NamedSharding(mesh, placement.spec) for placement in placements]
  return jax.tree.unflatten(jax.tree.structure(shapes), shardings)


def describe_shardings(
  axes: Any,
  shapes: Any,
  mesh: Mesh,
  rules: Rules = DEFAULT_RULES,
  *,
  fsdp_fallback: int | None = None,
) -> str:
  """A table of what `tree_shardings` decides: path, dtype, shape, spec, bytes per device, notes."""
  rows = []
  total = 0
  for placement in _place(axes, shapes, mesh, rules, fsdp_fallback):
    sharding = NamedSharding(mesh, placement.spec)
    size = math.prod(sharding.shard_shape(placement.shape)) * placement.dtype.itemsize
    total += size
    array = f"{placement.dtype.name}{list(placement.shape)}"
    rows.append((placement.path, array, _spec_text(placement.spec), f"{size:,}", placement.notes))
  width = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
  lines = []
  for path, array, spec, size, notes in rows:
    line = f"{path:<{width[0]}}  {array:<{width[1]}}  {spec:<{width[2]}}  {size:>{width[3]}}"
    lines.append("  ".join([line, *(f"! {note}" for note in notes)]))
  return "\n".join([*lines, f"{total:,} bytes per device"])


def _place(
  axes: Any, shapes: Any, mesh: Mesh, rules: Rules, fsdp_fallback: int | None
) -> list[Placement]:
  for name, mesh_axes in rules.items():
    for axis in mesh_axes:
      if axis not in mesh.shape:
        raise ValueError(f"rule {name!r} uses mesh axis {axis!r}; the mesh has {mesh.axis_names}.")
  named = _flatten(axes, is_leaf=lambda x: isinstance(x, tuple))
  arrays = _flatten(shapes)
  if named.keys() != arrays.keys():
    raise ValueError(
      f"axes and shapes are different trees: only in axes {sorted(named.keys() - arrays.keys())}, "
      f"only in shapes {sorted(arrays.keys() - named.keys())}."
    )
  return [
    _place_one(path, named[path], arrays[path], mesh, rules, fsdp_fallback) for path in arrays
  ]


def _flatten(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _place_one(
  path: str, names: Any, array: Any, mesh: Mesh, rules: Rules, fsdp_fallback: int | None
) -> Placement:
  shape = tuple(array.shape)
  if not isinstance(names, tuple) or len(names) != len(shape):
    raise ValueError(
      f"{path} has shape {shape} but axes {names!r}; expected a tuple of {len(shape)} names."
    )
  entries: list[Any] = []
  notes: list[str] = []
  used: set[str] = set()
  for dim, (name, size) in enumerate(zip(names, shape, strict=True)):
    if name is not None and name not in rules:
      raise ValueError(
        f"{path} {names} names axis {name!r}, which has no rule; known: {sorted(rules)}."
      )
    mesh_axes = rules[name] if name is not None else ()
    ways = math.prod(mesh.shape[axis] for axis in mesh_axes)
    split = "x".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes)
    if ways > 1 and size % ways:
      notes.append(f"dim {dim} ({name}={size}) is not divisible by {split}: kept whole")
      mesh_axes = ()
    elif ways > 1 and used.intersection(mesh_axes):
      notes.append(f"dim {dim} ({name}={size}) would use {split} a second time: kept whole")
      mesh_axes = ()
    used.update(mesh_axes)
    entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
  large = fsdp_fallback is not None and math.prod(shape) >= fsdp_fallback
  if large and all(entry is None for entry in entries):
    candidates = [
      dim
      for dim, size in enumerate(shape)
      if size % mesh.shape["fsdp"] == 0 and names[dim] != LAYERS
    ]
    if candidates:
      entries[max(candidates, key=lambda dim: shape[dim])] = "fsdp"
  return Placement(path, shape, np.dtype(array.dtype), PartitionSpec(*entries), tuple(notes))


def _spec_text(spec: PartitionSpec) -> str:
  return "P(" + ", ".join("+".join(e) if isinstance(e, tuple) else str(e) for e in spec) + ")"
