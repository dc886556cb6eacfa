"""Logical axis rules: map named dimensions to shardings.

A model names the dimensions of each parameter (`("embed", "mlp")`), and rules map each name to mesh
axes. The result is one `NamedSharding` per array, so models do not depend on a mesh.
"""

from collections.abc import Mapping
import logging
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

Rules = Mapping[str, tuple[str, ...]]  # logical name -> mesh axes; an empty tuple replicates


def tree_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules) -> Any:
  """Return one `NamedSharding` for each array of a tree.

  A dimension is left unsharded, with a warning, if its size is not divisible by its mesh axes or
  if an earlier dimension of the same array uses those axes.

  Args:
    axes: tree of tuples with one logical name or None (unsharded) per dimension.
    shapes: tree of arrays or `jax.ShapeDtypeStruct`s with the same structure.
    mesh: device mesh.
    rules: mapping from logical names to mesh axes.

  Raises:
    ValueError: if a name has no rule, a rule uses an unknown mesh axis, or the trees differ. The
      message contains the path of the parameter.
  """
  for name, mesh_axes in rules.items():
    for axis in mesh_axes:
      if axis not in mesh.shape:
        raise ValueError(f"rule {name!r} uses mesh axis {axis!r}; the mesh has {mesh.axis_names}.")
  names = _flatten(axes, is_leaf=lambda x: isinstance(x, tuple))
  arrays = _flatten(shapes)
  if names.keys() != arrays.keys():
    raise ValueError(
      f"axes and shapes are different trees: only in axes {sorted(names.keys() - arrays.keys())}, "
      f"only in shapes {sorted(arrays.keys() - names.keys())}."
    )
  specs = [_spec(path, names[path], tuple(arrays[path].shape), mesh, rules) for path in arrays]
  return jax.tree.unflatten(
    jax.tree.structure(shapes), [NamedSharding(mesh, spec) for spec in specs]
  )


def _flatten(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _spec(path: str, names: Any, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
  if not isinstance(names, tuple) or len(names) != len(shape):
    raise ValueError(
      f"{path} has shape {shape} but axes {names!r}; expected a tuple of {len(shape)} names."
    )
  entries: list[Any] = []
  used: set[str] = set()
  for dim, (name, size) in enumerate(zip(names, shape, strict=True)):
    if name is not None and name not in rules:
      raise ValueError(
        f"{path} {names} names axis {name!r}, which has no rule; known: {sorted(rules)}."
      )
    mesh_axes = tuple(axis for axis in rules.get(name, ()) if mesh.shape[axis] > 1)
    split = "x".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes)
    problem = None
    if size % math.prod(mesh.shape[axis] for axis in mesh_axes):
      problem = f"is not divisible by {split}"
    elif used.intersection(mesh_axes):
      problem = f"would use {split} twice"
    if problem is not None:
      logger.warning(
        "%s %s: dim %d (%s=%d) %s; left unsharded", path, shape, dim, name, size, problem
      )
      mesh_axes = ()
    used.update(mesh_axes)
    entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
  return PartitionSpec(*entries)
