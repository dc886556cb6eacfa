"""Tests of group accuracies against loops."""

import numpy as np
import pytest

from ov_eval.groups import group_accuracy, worst_group


def test_accuracy_of_groups_and_the_worst():
  rng = np.random.default_rng(0)
  groups = rng.choice([0, 2, 3, 7], 200)
  correct = rng.random(200) < 0.2 + 0.1 * groups
  found = group_accuracy(correct, groups)
  assert list(found) == [0, 2, 3, 7]
  for group, share in found.items():
    some = [c for c, g in zip(correct.tolist(), groups.tolist(), strict=True) if g == group]
    assert share.count == len(some) and share.value == pytest.approx(sum(some) / len(some))
  assert worst_group(found).value == min(share.value for share in found.values()) < 0.4


def test_errors():
  with pytest.raises(ValueError, match="group -1 must be at least 0"):
    group_accuracy(np.array([True]), np.array([-1]))
  with pytest.raises(ValueError, match=r"correct \(2,\) and groups \(3,\)"):
    group_accuracy(np.zeros(2, bool), np.zeros(3, int))
