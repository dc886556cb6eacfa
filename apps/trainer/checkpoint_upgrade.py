"""Upgrade of checkpoints of earlier versions, whose optimizer state is indexed by chain position.

The chain was AdamW as a tuple of eight transformations, two of which had arrays. `restore_arrays`
reads them by index and returns them by name.
"""

from collections.abc import Mapping
import re
from typing import Any

PyTree = Any

_NAMES = {1: "adamw", 5: "schedule"}  # by index
_INDEX = re.compile(r"^opt/([15])/")


def is_indexed(saved: PyTree) -> bool:
  """Return whether the optimizer state of a checkpoint is indexed by position."""
  return isinstance(saved, Mapping) and isinstance(saved.get("opt"), list)


def named_path(path: str) -> str:
  """Return the current path of an array of an indexed state."""
  return _INDEX.sub(lambda match: f"opt/{_NAMES[int(match[1])]}/", path)


def to_indexed(state: PyTree, saved: PyTree) -> PyTree:
  """Return the tree for restoring `state` from a checkpoint with an indexed state.

  Args:
    state: train state of the run; it may lack the optimizer state.
    saved: tree of the checkpoint; its entries without arrays are copied.
  """
  if "opt" not in state:
    return state
  opt = list(saved["opt"])
  for index, name in _NAMES.items():
    opt[index] = state["opt"][name]
  return {**state, "opt": opt}


def to_named(state: PyTree) -> PyTree:
  """Convert a state that was restored into the tree of `to_indexed` to names."""
  if "opt" not in state:
    return state
  return {**state, "opt": {name: state["opt"][index] for index, name in _NAMES.items()}}
