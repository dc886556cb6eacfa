"""Names of settings: all names, renamed ones, and the nearest match of a misspelt one."""

from collections.abc import Iterator, Mapping, Sequence
import difflib
from typing import Any

# Renamed settings; configuration files, flags and stages may still use the old name.
MOVED = {
  "model.caption_weight": "loss.caption",
  "model.label_smoothing": "loss.label_smoothing",
  "model.z_loss": "loss.z_loss",
}


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
  """Yield the dotted names of all settings and sections."""
  for key, value in tree.items():
    yield f"{path}{key}"
    if isinstance(value, Mapping):
      yield from leaves(value, f"{path}{key}.")


def leaf_values(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  """Yield the dotted name and the value of each leaf; an empty mapping is a leaf."""
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from leaf_values(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", value


def nearest_leaf(name: str, names: Sequence[str]) -> str | None:
  """Return the setting that is nearest to a misspelt name.

  Args:
    name: dotted name, such as "optimiser.learning_rate".
    names: all names of settings.

  Returns:
    The nearest of `names`, or else the nearest with the same last part; None if none is near.
  """
  if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
    return near[0]
  last = {known.rpartition(".")[2]: known for known in reversed(names)}
  near = difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
  return last[near[0]] if near else None
