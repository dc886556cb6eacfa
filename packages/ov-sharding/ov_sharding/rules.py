"""From logical axis names to shardings.

A model names the dimensions of each parameter (`("embed", "mlp")`); rules map each name to mesh
axes; the result is one `NamedSharding` per array. Models so stay free of any mesh.
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

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


def logical_sharding(
  names: tuple[str | None, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
  """Sharding of one array by its axis names, for `jax.lax.with_sharding_constraint`.

  `logical_sharding(("activation_batch", None, None), mesh)` splits a [B,T,D] activation by rows.

  Raises:
    ValueError: on a name without a rule, or a rule with an unknown mesh axis.
  """
  _check_rules(mesh, rules)
  entries = [_entry(_mesh_axes(name, f"axes {names}", mesh, rules)) for name in names]
  return NamedSharding(mesh, PartitionSpec(*entries))


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
  for path, array, spec, bytes_text, notes in rows:
    line = f"{path:<{width[0]}}  {array:<{width[1]}}  {spec:<{width[2]}}  {bytes_text:>{width[3]}}"
    lines.append("  ".join([line, *(f"! {note}" for note in notes)]))
  return "\n".join([*lines, f"{total:,} bytes per device"])


def _place(
  axes: Any, shapes: Any, mesh: Mesh, rules: Rules, fsdp_fallback: int | None
) -> list[Placement]:
  _check_rules(mesh, rules)
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


def _check_rules(mesh: Mesh, rules: Rules) -> None:
  for name, mesh_axes in rules.items():
    for axis in mesh_axes:
      if axis not in mesh.shape:
        raise ValueError(f"rule {name!r} uses mesh axis {axis!r}; the mesh has {mesh.axis_names}.")


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
    mesh_axes = _mesh_axes(name, f"{path} {names}", mesh, rules)
    split = "x".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes)
    if size % math.prod(mesh.shape[axis] for axis in mesh_axes):
      notes.append(f"dim {dim} ({name}={size}) is not divisible by {split}: kept whole")
      mesh_axes = ()
    elif used.intersection(mesh_axes):
      notes.append(f"dim {dim} ({name}={size}) would use {split} a second time: kept whole")
      mesh_axes = ()
    used.update(mesh_axes)
    entries.append(_entry(mesh_axes))
  if fsdp_fallback is not None and math.prod(shape) >= fsdp_fallback and not used:
    ways = mesh.shape["fsdp"]
    candidates = [d for d in range(len(shape)) if shape[d] % ways == 0 and names[d] != LAYERS]
    if ways > 1 and candidates:
      entries[max(candidates, key=lambda dim: shape[dim])] = "fsdp"
  return Placement(path, shape, np.dtype(array.dtype), PartitionSpec(*entries), tuple(notes))


def _mesh_axes(name: str | None, where: str, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
  """Mesh axes that split a dimension of this name; those of size 1 split nothing."""
  if name is None:
    return ()
  if name not in rules:
    raise ValueError(f"{where} names axis {name!r}, which has no rule; known: {sorted(rules)}.")
  return tuple(axis for axis in rules[name] if mesh.shape[axis] > 1)


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
  return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None


def _spec_text(spec: PartitionSpec) -> str:
  return "P(" + ", ".join("+".join(e) if isinstance(e, tuple) else str(e) for e in spec) + ")"
