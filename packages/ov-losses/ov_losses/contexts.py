"""Support for `jax.shard_map` and for meshes with Explicit axes.

The losses are written for one device or for Auto axes. Two contexts give arrays a stricter type:

  Explicit axes      the type includes the sharding, which every op must specify. `run` switches
                     these axes to Auto for the loss; results are Explicit again.
  jax.shard_map      the type includes the manual axes that the array varies over, and the carry of
                     a `lax.scan` must keep its type. `run` makes all arguments vary over the same
                     axes, and `zeros` creates carries that vary like another array.

No private or version-dependent attribute is used: an empty sum is a zero that varies over the same
axes as its array.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def run(f: Callable[..., Any], *args: Any, rows: jax.Array | None = None) -> Any:
  """Return f(*args), computed with Auto axes and with arguments that vary over the same axes.

  Args:
    f: function that does not close over arrays.
    *args: trees of arrays.
    rows: array whose first dimension has the sharding of the first dimension of every result; None
      if all results are scalars. Used on Explicit axes only.
  """
  mesh = _explicit_mesh(args)
  if mesh is None:
    return f(*_varying_alike(args))
  spec = P() if rows is None else P(*tuple(jax.typeof(rows).sharding.spec)[:1])
  automatic = jax.sharding.auto_axes(f, out_sharding=NamedSharding(mesh, spec))
  return automatic(*args)


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
  """Return float32 zeros that vary over the same manual axes as `like`."""
  return jnp.zeros(shape, jnp.float32) + varying_zero(like)


def varying_zero(tree: Any) -> jax.Array | float:
  """Return a float32 0 that varies over the manual axes of every leaf; outside shard_map, 0.0."""
  if not manual_axes():
    return 0.0
  parts = [jnp.sum(jnp.atleast_1d(leaf)[:0], dtype=jnp.float32) for leaf in jax.tree.leaves(tree)]
  return jax.lax.stop_gradient(sum(parts, jnp.float32(0)))


def manual_axes() -> tuple[str, ...]:
  """Return the manual axes of the enclosing `jax.shard_map` or `jax.pmap`."""
  mesh = jax.sharding.get_abstract_mesh()
  return _axes_of_type(mesh, AxisType.Manual)


def automatic_mesh(mesh: Mesh) -> Mesh | None:
  """Return the mesh for a `jax.shard_map` inside `run`; None if a mesh is already set."""
  if not jax.sharding.get_abstract_mesh().empty:
    return None
  if not _axes_of_type(mesh, AxisType.Explicit):
    return mesh
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def reshaped(x: jax.Array, change: Callable[[jax.Array], jax.Array], axis: int) -> jax.Array:
  """Return change(x); on Explicit axes, its dimension `axis` gets the sharding of the batch of x.

  The batch is the first dimension of x, or the second if the first is unsharded.
  """
  mesh = _explicit_mesh(x)
  if mesh is None:
    return change(x)
  first, second = (*jax.typeof(x).sharding.spec, None, None)[:2]
  spec = P(*[None] * axis, first if first is not None else second)
  return jax.sharding.auto_axes(change, out_sharding=NamedSharding(mesh, spec))(x)


def _varying_alike(args: tuple[Any, ...]) -> tuple[Any, ...]:
  if not manual_axes():
    return args
  zero = varying_zero(args)

  def add(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if leaf.dtype == bool:
      return leaf | (zero != 0)
    return leaf + jnp.asarray(zero, leaf.dtype)

  return jax.tree.map(add, args)


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
  """Return the mesh with Explicit axes of the arrays or the current context, if any."""
  meshes = [jax.sharding.get_abstract_mesh()]
  meshes += [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
  return next((mesh for mesh in meshes if _axes_of_type(mesh, AxisType.Explicit)), None)


def _axes_of_type(mesh: Mesh | AbstractMesh, kind: AxisType) -> tuple[str, ...]:
  if mesh.empty:
    return ()
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, each in types if each == kind)
