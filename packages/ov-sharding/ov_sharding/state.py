"""Shardings of a whole training state from those of its params."""

import logging
import math
from typing import Any

import jax
from jax.sharding import Mesh

from ov_sharding.batch import replicated

logger = logging.getLogger(__name__)


def state_shardings(state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Shardings for a state that holds copies of the params: moments, averages, the params.

  A leaf whose path ends with the path of a param (the longest such one) and that has its shape
  takes its sharding: `opt/0/mu/encoder/kernel` follows `encoder/kernel`. All other leaves are
  replicated; those with more than one element are logged, for they cost memory on every device.

  Args:
    state: tree of arrays or `jax.ShapeDtypeStruct`s, for example an optimizer state.
    params: tree of the params' shapes.
    param_shardings: the same tree of shardings.
    mesh: the devices of the replicated leaves.

  Returns:
    The tree of `state` with a sharding for each leaf.

  Raises:
    ValueError: when `params` and `param_shardings` are different trees.
  """
  if jax.tree.structure(params) != jax.tree.structure(param_shardings):
    raise ValueError(
      f"params {jax.tree.structure(params)} and param_shardings "
      f"{jax.tree.structure(param_shardings)} are different trees."
    )
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  known = {
    _keys(path): (tuple(leaf.shape), sharding)
    for (path, leaf), sharding in zip(flat, jax.tree.leaves(param_shardings), strict=True)
  }

  def follow(path: tuple, leaf: Any) -> jax.sharding.Sharding:
    keys, shape = _keys(path), tuple(leaf.shape)
    suffixes = (keys[start:] for start in range(len(keys) + 1))
    shape_of_param, sharding = next((known[s] for s in suffixes if s in known), (None, None))
    if shape == shape_of_param:
      return sharding
    if math.prod(shape) > 1:
      logger.warning("%s %s follows no param: replicated", "/".join(keys), shape)
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(follow, state)


def _keys(path: tuple) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
