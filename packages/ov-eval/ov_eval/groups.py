"""Accuracy of groups of examples and of the worst group, as in WILDS (arXiv 2012.07421)."""

from collections.abc import Mapping

import numpy as np

from ov_eval.states import Share


def group_accuracy(correct: np.ndarray, groups: np.ndarray) -> dict[int, Share]:
  """Return the accuracy of each group that has examples, in order of group number.

  Args:
    correct: bool [N], whether the prediction is correct.
    groups: int [N], group of each example, at least 0.

  Raises:
    ValueError: if the shapes differ, there is no example, or a group is negative.
  """
  correct, groups = np.asarray(correct, bool), np.asarray(groups)
  if correct.ndim != 1 or correct.shape != groups.shape or not len(correct):
    raise ValueError(
      f"correct {correct.shape} and groups {groups.shape} must have one shape [N] with at "
      "least one example."
    )
  if groups.min() < 0:
    raise ValueError(f"group {groups.min()} must be at least 0.")
  return {int(group): Share.of(correct[groups == group]) for group in np.unique(groups)}


def worst_group(accuracies: Mapping[int, Share]) -> Share:
  """Return the lowest accuracy of `group_accuracy`; of equal ones that of the lowest number."""
  return min(accuracies.values(), key=lambda share: share.value)
