"""Run models inside the caller's `jax.shard_map` and on meshes with Explicit axes.

The models are written for one device or for Auto axes. On Explicit axes the type of an array holds
its sharding, and every op must say how it changes it: `run` and `any_mesh` switch such axes to Auto
for the model, and its results come back Explicit, split as the batch is. Inside `jax.shard_map` the
type holds the manual axes that an array varies over, and loops need carries of one type: `vary_as`
makes an array vary as others do.
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
  """Make a method of a module work on Explicit axes.

  Args:
    axis: dimension of every result that is the batch, the first dimension of the first argument.
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
  """Return f(*args) computed with Auto axes.

  Args:
    f: must not close over arrays.
    *args: trees of arrays.
    rows: array whose first dimension is the batch, laid out as dimension `axis` of every result.
    axis: see `rows`.
  """
  mesh = explicit_mesh(args)
  if mesh is None:
    return f(*args)
  batch = tuple(jax.typeof(rows).sharding.spec)[:1]
  sharding = NamedSharding(mesh, P(*[None] * axis, *batch))
  return jax.sharding.auto_axes(f, out_sharding=sharding)(*args)


def vary_as(x: jax.Array, tree: Any) -> jax.Array:
  """Return x, varying over the manual axes of every array in `tree` as well as over its own."""
  if not manual_axes():
    return x
  for leaf in jax.tree.leaves(tree):
    # An empty sum is a zero that varies over the same axes as its array.
    zero = jnp.sum(jnp.atleast_1d(_numbers(leaf))[:0], dtype=jnp.float32)
    zero = jax.lax.stop_gradient(zero)
    x = x | (zero != 0) if x.dtype == bool else x + zero.astype(x.dtype)
  return x


def manual_axes() -> tuple[str, ...]:
  """Return the axes of the `jax.shard_map` (or `jax.pmap`) that is being traced."""
  return _axes_of_type(jax.sharding.get_abstract_mesh(), AxisType.Manual)


def explicit_mesh(tree: Any) -> AbstractMesh | None:
  """Return the mesh with Explicit axes that the arrays or the current context are on, if any."""
  meshes = [jax.sharding.get_abstract_mesh()]
  meshes += [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
  return next((mesh for mesh in meshes if _axes_of_type(mesh, AxisType.Explicit)), None)


def automatic_mesh(mesh: Mesh) -> Mesh | AbstractMesh:
  """Return the mesh for constraints inside `run`: the current one if `mesh` has Explicit axes."""
  if not _axes_of_type(mesh, AxisType.Explicit):
    return mesh
  current = jax.sharding.get_abstract_mesh()
  if not current.empty:
    return current
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _numbers(leaf: jax.Array) -> jax.Array:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(leaf)
  return leaf


def _axes_of_type(mesh: Mesh | AbstractMesh, kind: AxisType) -> tuple[str, ...]:
  if mesh.empty:
    return ()
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, each in types if each == kind)
