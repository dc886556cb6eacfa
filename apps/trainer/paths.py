"""Paths of parameters: the keys of a nested dict joined by "/", e.g. `encoder/norm/scale`."""

from collections.abc import Sequence
from typing import Any

import jax

PyTree = Any


def path_str(path: Sequence[Any]) -> str:
  """Return the keys of a JAX key path joined by "/"."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten_paths(tree: PyTree) -> dict[str, Any]:
  """Return the leaves of `tree` by path, in the order of `jax.tree.leaves`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_str(path): leaf for path, leaf in leaves}


def is_stacked(path: str) -> bool:
  """Return whether the first axis of a parameter counts layers."""
  return "blocks/" in path
