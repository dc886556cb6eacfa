"""Where activations live on a device mesh, told from outside for the duration of a trace.

Modules know no mesh. A train step that runs on several devices enters `on_mesh` around its call of
the model, inside the jitted function. It pins activations to the batch axes, so that XLA gathers
sharded weights instead of splitting activations, and lets the TPU kernel, which XLA cannot
partition, run per device.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ov_models.contexts import automatic_mesh, manual_axes


@dataclasses.dataclass(frozen=True)
class _Layout:
  mesh: Mesh
  batch: tuple[str, ...]
  tensor: str | None


_layout: contextvars.ContextVar[_Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def on_mesh(
  mesh: Mesh | None, batch: tuple[str, ...] = ("data", "fsdp"), tensor: str | None = "tensor"
) -> Iterator[None]:
  """While active, models traced by this thread lay their activations out on `mesh`.

  Args:
    mesh: None switches the layout off.
    batch: mesh axes that share the batch; those the mesh lacks are ignored.
    tensor: mesh axis that shares heads, MLP units and vocabulary, if the mesh has it.
  """
  layout = None
  if mesh is not None:
    names = mesh.axis_names
    layout = _Layout(
      mesh, tuple(a for a in batch if a in names), tensor if tensor in names else None
    )
  token = _layout.set(layout)
  try:
    yield
  finally:
    _layout.reset(token)


def current() -> _Layout | None:
  """The active layout; part of the cache key of whatever jits a model on its own."""
  return _layout.get()


@contextlib.contextmanager
def using(layout: _Layout | None) -> Iterator[None]:
  """Re-enters a layout taken by `current`."""
  token = _layout.set(layout)
  try:
    yield
  finally:
    _layout.reset(token)


def constrain(x: jax.Array, tensor_axis: int | None = None) -> jax.Array:
  """Pins x [B, ...] to the batch axes, and dimension `tensor_axis` to the tensor axis."""
  layout = _layout.get()
  if layout is None or manual_axes():  # a device inside jax.shard_map has its part only
    return x
  spec = _spec(layout, x.ndim, tensor_axis)
  sharding = NamedSharding(automatic_mesh(layout.mesh), spec)
  return jax.lax.with_sharding_constraint(x, sharding)


def per_device(
  f: Callable[..., jax.Array], tensor_axes: Sequence[int | None]
) -> Callable[..., jax.Array]:
  """f over arrays [B, ...], run on each device's part of batch and heads.

  Args:
    f: its result is laid out as its first argument.
    tensor_axes: which dimension of each argument the tensor axis shares, or None.
  """
  layout = _layout.get()
  if layout is None or manual_axes():
    return f

  def run(*args: jax.Array) -> jax.Array:
    specs = tuple(_spec(layout, a.ndim, axis) for a, axis in zip(args, tensor_axes, strict=True))
    mesh = automatic_mesh(layout.mesh)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*args)

  return run


def _spec(layout: _Layout, ndim: int, tensor_axis: int | None) -> PartitionSpec:
  names: list[tuple[str, ...] | str | None] = [None] * ndim
  names[0] = layout.batch
  if tensor_axis is not None:
    names[tensor_axis] = layout.tensor
  return PartitionSpec(*names)
