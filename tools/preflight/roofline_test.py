"""Tests of the roofline bound."""

import pytest

from tools.preflight.roofline import bound, executed_flops
from tools.preflight.topology import CHIPS


def test_the_bound_is_the_longest_part():
  chip = CHIPS["v5litepod"]
  found = bound(chip, flops_per_device=197e12, moved=0.819e12 * 2, sent=1.0)
  assert (found.compute, found.memory, found.limit, found.seconds) == (1.0, 2.0, "memory", 2.0)
  only = bound(chip, flops_per_device=197e12)
  assert (only.memory, only.links, only.limit, only.seconds) == (None, None, "matmuls", 1.0)


@pytest.mark.parametrize("remat, factor", [("none", 3), ("dots", 3), ("full", 4)])
def test_full_rematerialisation_is_one_more_forward_pass(remat: str, factor: int):
  assert executed_flops(3e9, remat) == pytest.approx(factor * 1e9)
