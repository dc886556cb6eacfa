"""Names of settings: all of a configuration, and the nearest to a misspelt one."""

from collections.abc import Iterator, Mapping, Sequence
import difflib
from typing import Any

from ml_collections import ConfigDict


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
  """Yield the dotted names of all settings, those of whole sections too."""
  for key, value in tree.items():
    yield f"{path}{key}"
    if isinstance(value, Mapping | ConfigDict):
      yield from leaves(value, f"{path}{key}.")


def nearest_leaf(name: str, names: Sequence[str]) -> str | None:
  """Return the setting that a misspelt name most likely means.

  Args:
    name: dotted, such as "optimiser.learning_rate".
    names: all settings.

  Returns:
    The nearest of `names`, else the nearest with an equal last part; None where nothing is near.
  """
  if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
    return near[0]
  last = {known.rpartition(".")[2]: known for known in reversed(names)}
  near = difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
  return last[near[0]] if near else None
