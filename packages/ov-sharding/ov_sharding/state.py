"""Shardings of a training state, derived from the shardings of its parameters."""

import logging
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ov_sharding.batch import replicated

logger = logging.getLogger(__name__)


def state_shardings(state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Return shardings for a state that contains parameter-like trees, such as Adam moments or EMA.

  A leaf matches the parameter with the longest path that is a suffix of the path of the leaf:
  `opt/0/mu/encoder/kernel` matches `encoder/kernel`.

  - A leaf with the shape of its parameter gets the sharding of the parameter.
  - A leaf with the same number of dimensions but other sizes (row means, per-block scales) is
    sharded along the dimensions that the mesh axes of the parameter divide.
  - All other leaves are replicated. Those with more than one element are logged, because they use
    memory on every device.

  Args:
    state: tree of arrays or `jax.ShapeDtypeStruct`s, for example an optimizer state.
    params: tree of parameter shapes.
    param_shardings: tree of shardings with the structure of `params`.
    mesh: device mesh of the replicated leaves.

  Returns:
    A tree of shardings with the structure of `state`.

  Raises:
    ValueError: if `params` and `param_shardings` have different numbers of leaves.
  """
  by_path = jax.tree_util.tree_flatten_with_path(params)[0]
  flat_shardings = jax.tree.leaves(param_shardings)
  if len(by_path) != len(flat_shardings):
    raise ValueError(
      f"params has {len(by_path)} leaves and param_shardings {len(flat_shardings)}; expected the "
      "tree that tree_shardings returns for these params."
    )
  known = {
    _keys(path): (tuple(leaf.shape), sharding)
    for (path, leaf), sharding in zip(by_path, flat_shardings, strict=True)
  }

  def follow(path: tuple[Any, ...], leaf: Any) -> Sharding:
    keys, shape = _keys(path), tuple(leaf.shape)
    for start in range(len(keys)):
      if keys[start:] in known:
        shape_of_param, sharding = known[keys[start:]]
        if shape == shape_of_param:
          return sharding
        if len(shape) == len(shape_of_param) and isinstance(sharding, NamedSharding):
          return _split_where_even(shape, sharding)
        break
    if math.prod(shape) > 1:
      logger.warning("%s %s matches no parameter; replicated", "/".join(keys), shape)
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(follow, state)


def bytes_per_device(shapes: Any, shardings: Any) -> int:
  """Return the number of bytes of a tree of arrays on one device.

  Args:
    shapes: tree of arrays or `jax.ShapeDtypeStruct`s. PRNG key arrays count as their key data.
    shardings: tree of shardings with the same structure.
  """

  def size(array: Any, sharding: Sharding) -> int:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      array = jax.eval_shape(jax.random.key_data, array)
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))


def _split_where_even(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
  """Return the sharding without the mesh axes that do not divide their dimension."""
  entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
  axes = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
  parts = [math.prod(sharding.mesh.shape[axis] for axis in names) for names in axes]
  even = [e if n % p == 0 else None for n, e, p in zip(shape, entries, parts, strict=True)]
  return NamedSharding(sharding.mesh, PartitionSpec(*even))


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
