"""Checkpoints of earlier versions: the optimizer state by index in the chain, not by name.

The chain was AdamW in a tuple of eight transformations, of which two had arrays. `restore_arrays`
reads them by their indices and returns them by name.
"""

from collections.abc import Mapping
import re
from typing import Any

PyTree = Any

_NAMES = {1: "adamw", 5: "schedule"}  # by index
_INDEX = re.compile(r"^opt/([15])/")


def is_indexed(saved: PyTree) -> bool:
  """Return whether the tree of a checkpoint has an optimizer state by index."""
  return isinstance(saved, Mapping) and isinstance(saved.get("opt"), list)


def named_path(path: str) -> str:
  """Return the path that an array of an indexed state has now."""
  return _INDEX.sub(lambda match: f"opt/{_NAMES[int(match[1])]}/", path)


def to_indexed(state: PyTree, saved: PyTree) -> PyTree:
  """Return the tree to restore for `state` from a checkpoint with an indexed state.

  Args:
    state: of the run; it may lack the optimizer state.
    saved: tree of the checkpoint; its entries without arrays are taken over.
  """
  if "opt" not in state:
    return state
  opt = list(saved["opt"])
  for index, name in _NAMES.items():
    opt[index] = state["opt"][name]
  return {**state, "opt": opt}


def to_named(state: PyTree) -> PyTree:
  """Return the state that was restored into the tree of `to_indexed`, by name."""
  if "opt" not in state:
    return state
  return {**state, "opt": {name: state["opt"][index] for index, name in _NAMES.items()}}
