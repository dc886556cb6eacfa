"""Logical axis names of parameters and activations, and the rules that map them to mesh axes.

Modules name the dimensions of their parameters and activations; `RULES` maps each name to mesh
axes. The caller of `init` shards parameters with `logical_axes`. Under `jax.set_mesh`, `constrain`
shards activations, so that XLA gathers sharded weights instead of splitting activations.
"""

from collections.abc import Callable, Mapping
import math
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

# Logical name -> mesh axes; an empty tuple leaves the dimension unsharded.
RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
  {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": (),
    "layers": (),
    "mlp": ("tensor",),
    "norm": ("tensor",),
    "vocab": ("tensor",),
  }
)

HIDDEN = ("batch", "length", "embed")
HEADS = ("batch", "length", "heads", "kv")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrain the sharding of x on the current mesh by the names of its dimensions.

  Without a mesh and inside `jax.shard_map`, x is returned unchanged. A mesh axis is used for the
  first dimension with its name only. A dimension is left unsharded if its size is not divisible by
  the mesh axes, and left to XLA if the mesh has none of the axes. If no dimension is sharded, x is
  left to XLA as a whole.

  Args:
    x: array of any rank.
    *names: key of `RULES` for each dimension, or None for an unsharded dimension.
  """
  mesh = _automatic_mesh()
  if mesh is None:
    return x
  spec = _spec(mesh, x.shape, names)
  if all(entry is PartitionSpec.UNCONSTRAINED or entry is None for entry in spec):
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def per_device(
  f: Callable[..., jax.Array], names: tuple[tuple[str | None, ...], ...]
) -> Callable[..., jax.Array]:
  """Return f, mapped over the shards of its arguments.

  Args:
    f: function whose result has the dimensions of its first argument.
    names: dimension names of each argument, as for `constrain`.
  """

  def run(*args: jax.Array) -> jax.Array:
    mesh = _automatic_mesh()
    if mesh is None:
      return f(*args)
    free = PartitionSpec.UNCONSTRAINED
    specs = tuple(
      PartitionSpec(*[None if entry is free else entry for entry in _spec(mesh, a.shape, own)])
      for a, own in zip(args, names, strict=True)
    )
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)

  return run


def platform() -> str:
  """Return the platform of the current mesh, or of the default device without a mesh."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  # Before jax 0.10, abstract meshes have no platform.
  return getattr(device, "platform", None) or jax.default_backend()


def _automatic_mesh() -> AbstractMesh | None:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh


def _spec(
  mesh: AbstractMesh, shape: tuple[int, ...], names: tuple[str | None, ...]
) -> PartitionSpec:
  entries: list[Any] = []
  used: set[str] = set()
  for size, name in zip(shape, names, strict=True):
    rule = () if name is None else RULES[name]
    axes = tuple(axis for axis in rule if axis in mesh.axis_names)
    if rule and not axes:
      entries.append(PartitionSpec.UNCONSTRAINED)
    elif used.intersection(axes) or size % math.prod(mesh.shape[axis] for axis in axes):
      entries.append(None)
    else:
      entries.append(axes or None)
    # Also if they do not divide the size: later dimensions must not use the axes of this one.
    used.update(axes)
  return PartitionSpec(*entries)
