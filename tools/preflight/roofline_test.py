"""Bytes a program moves, and the time it takes at best."""

import pytest

from tools.preflight import hlo
from tools.preflight.roofline import bound, executed_flops, traffic
from tools.preflight.testing import TEXT
from tools.preflight.topology import CHIPS


def test_slices_of_stacked_layers_count_as_slices():
  # The sum reads one array twice and writes it. 12 turns of the loop read a twelfth each and the
  # counter, and keep the result on the chip; the condition compares two counters and writes a byte.
  whole = 12 * 8 * 4 * 4
  assert traffic(hlo.parse(TEXT)) == 3 * whole + 12 * (whole // 12 + 4) + 12 * (4 + 4 + 1)


UPDATE = """\
%put (stack: f32[12,8], new: f32[1,8], i: s32[]) -> f32[12,8] {
  %stack = f32[12,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %done = f32[12,8]{1,0} dynamic-update-slice(%stack, %new, %i, %i)
}

ENTRY %main (a: f32[12,8], b: f32[1,8], n: s32[]) -> f32[12,8] {
  %a = f32[12,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %moved = (f32[1,8]{1,0:S(1)}, f32[1,8]{1,0}, u32[]) copy-start(%b)
  ROOT %f = f32[12,8]{1,0} fusion(%a, %b, %n), kind=kLoop, calls=%put
}
"""


def test_updates_in_place_and_copies_to_the_chip():
  # The copy reads 32 bytes of main memory; the update reads them and the index, and writes 32.
  assert traffic(hlo.parse(UPDATE)) == 32 + (32 + 4) + 32


def test_the_longest_part_bounds():
  chip = CHIPS["v5litepod"]
  found = bound(chip, flops_per_device=197e12, moved=0.819e12 * 2, sent=1.0)
  assert (found.compute, found.memory, found.limit, found.seconds) == (1.0, 2.0, "memory", 2.0)
  only = bound(chip, flops_per_device=197e12)
  assert (only.memory, only.links, only.limit, only.seconds) == (None, None, "products", 1.0)


@pytest.mark.parametrize("remat, factor", [("none", 3), ("dots", 3), ("full", 4)])
def test_full_rematerialisation_is_one_more_forward_pass(remat: str, factor: int):
  assert executed_flops(3e9, remat) == pytest.approx(factor * 1e9)
