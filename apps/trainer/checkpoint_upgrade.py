"""Checkpoints of earlier versions: the optimizer state by index in the chain, not by name.

The chain was AdamW with these eight transformations, a tuple. `restore_arrays` reads such a state
into the tuple and returns it by name.
"""

from collections.abc import Iterable
import re
from typing import Any

import optax

PyTree = Any

# The transformations of the chain in the order of their indices, by the names they have now.
_NAMES = ("clip", "adamw", "weight_decay", "rate", "multipliers", "schedule", "frozen", "sign")
_INDEX = re.compile(r"^opt/([0-7])/")


def is_indexed(paths: Iterable[str]) -> bool:
  """Return whether the paths of a checkpoint have an optimizer state by index."""
  return any(_INDEX.match(path) for path in paths)


def named_path(path: str) -> str:
  """Return the path that an array of an indexed state has now."""
  return _INDEX.sub(lambda match: f"opt/{_NAMES[int(match[1])]}/", path)


def to_indexed(state: PyTree) -> PyTree:
  """Return the state, or the part of one, with the optimizer state as it was saved."""
  if "opt" not in state:
    return state
  by_name = state["opt"]
  return {**state, "opt": tuple(by_name.get(name, optax.EmptyState()) for name in _NAMES)}


def to_named(state: PyTree, like: PyTree) -> PyTree:
  """Return the reverse of `to_indexed`.

  Args:
    state: with an indexed optimizer state.
    like: the same by name; what it has in addition has no arrays.
  """
  if "opt" not in state:
    return state
  by_name = dict(zip(_NAMES, state["opt"], strict=True))
  return {**state, "opt": {name: by_name.get(name, part) for name, part in like["opt"].items()}}
