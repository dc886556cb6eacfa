"""Support for `jax.shard_map` and for meshes with Explicit axes.

The models are written for one device or for Auto axes. With Explicit axes, the type of an array
includes its sharding, which every op must specify. `run` and `any_mesh` switch these axes to Auto
for the model; results are Explicit again and sharded like the batch. Inside `jax.shard_map`, the
type includes the manual axes that an array varies over, and loop carries must keep their type:
`vary_as` makes an array vary over the axes of others.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar, cast

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Method = TypeVar("Method", bound=Callable[..., Any])


def any_mesh(axis: int = 0) -> Callable[[Method], Method]:
  """Make a method of a module work with Explicit axes.

  Args:
    axis: batch dimension of every result; the batch is the first dimension of the first argument.
  """

  def decorate(method: Method) -> Method:
    @functools.wraps(method)
    def wrapped(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
      graphdef, state = nnx.split(module)
      if explicit_mesh((state, args, kwargs)) is None:
        return method(module, *args, **kwargs)

      def call(state: Any, args: Any, kwargs: Any) -> Any:
        return method(nnx.merge(graphdef, state), *args, **kwargs)

      rows = next(iter([*args, *kwargs.values()]))
      return run(call, state, args, kwargs, rows=rows, axis=axis)

    return cast(Method, wrapped)

  return decorate


def run(f: Callable[..., Any], *args: Any, rows: jax.Array, axis: int = 0) -> Any:
  """Return f(*args), computed with Auto axes.

  Args:
    f: function that does not close over arrays.
    *args: trees of arrays.
    rows: array whose first dimension is the batch.
    axis: dimension of every result that gets the sharding of the batch.
  """
  mesh = explicit_mesh(args)
  if mesh is None:
    return f(*args)
  batch = tuple(jax.typeof(rows).sharding.spec)[:1]
  sharding = NamedSharding(mesh, P(*[None] * axis, *batch))
  return jax.sharding.auto_axes(f, out_sharding=sharding)(*args)


def vary_as(x: jax.Array, tree: Any) -> jax.Array:
  """Return x, varying over its manual axes and those of every array in `tree`."""
  if not manual_axes():
    return x
  for leaf in jax.tree.leaves(tree):
    # An empty sum is a zero that varies over the same axes as its array.
    zero = jnp.sum(jnp.atleast_1d(_numbers(leaf))[:0], dtype=jnp.float32)
    zero = jax.lax.stop_gradient(zero)
    x = x | (zero != 0) if x.dtype == bool else x + zero.astype(x.dtype)
  return x


def manual_axes() -> tuple[str, ...]:
  """Return the manual axes of the enclosing `jax.shard_map` or `jax.pmap`."""
  return _axes_of_type(jax.sharding.get_abstract_mesh(), AxisType.Manual)


def explicit_mesh(tree: Any) -> AbstractMesh | None:
  """Return the mesh with Explicit axes of the arrays or the current context, if any."""
  meshes = [jax.sharding.get_abstract_mesh()]
  meshes += [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
  return next((mesh for mesh in meshes if _axes_of_type(mesh, AxisType.Explicit)), None)


def _numbers(leaf: jax.Array) -> jax.Array:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(leaf)
  return leaf


def _axes_of_type(mesh: Mesh | AbstractMesh, kind: AxisType) -> tuple[str, ...]:
  if mesh.empty:
    return ()
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, each in types if each == kind)
