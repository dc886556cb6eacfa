"""Tests of cloud names, slice shapes, and the choice of smaller slices for compilation."""

import pytest

from tools.preflight import topology
from tools.preflight.topology import CHIPS, parse, smallest, target
from tools.tpu.names import GENERATIONS


def test_cloud_names():
  found = parse("v4-512")
  assert (found.name, found.chips, found.hosts) == ("v4-512", 256, 64)
  assert found.chip is CHIPS["v4"] and found.slice.shape == "4x8x8"
  assert parse("v5e-16").name == parse("v5litepod-16").name == "v5litepod-16"
  assert parse("v5e-16").chip.name == "v5e"
  assert CHIPS.keys() == GENERATIONS.keys()


def test_slices():
  found = parse("v5e-16", 4)
  assert (found.chips, found.hosts, found.name) == (64, 16, "4 x v5litepod-16")


@pytest.mark.parametrize(
  ("name", "slices", "message"),
  [
    ("tpu-8", 1, 'expected one of v4-N, .*; or "here"'),
    ("v4-7", 1, "v4 comes in the sizes 8, 16"),
    ("v5e-16", 0, "--slices=0"),
  ],
)
def test_invalid_names(name: str, slices: int, message: str):
  with pytest.raises(ValueError, match=message):
    parse(name, slices)


def test_smallest_slice():
  v4 = parse("v4-512").slice
  found = {chips: smallest(v4, chips) for chips in (1, 2, 4, 8, 32)}
  assert {n: slice and slice.chips for n, slice in found.items()} == {
    1: 4, 2: 4, 4: 4, 8: 8, 32: 32,
  }  # fmt: skip
  assert smallest(parse("v5e-16").slice, 3) is None


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(topology, "has_libtpu", lambda: False)
  wanted = target("v4-512")
  assert wanted.chips == 256 and not topology.can_compile(wanted)
  with pytest.raises(ValueError, match="compiling for v4-512 needs libtpu.*OV_EXTRAS=tpu"):
    wanted.devices()


def test_gpus():
  cards = target("h100-16")
  assert (cards.name, cards.chips, cards.hosts) == ("16 x NVIDIA H100", 16, 2)
  assert target("l4").chips == 1 and not topology.can_compile(cards)
  assert "--topology=here" in topology.why_not(cards)
  for name in ("h100-0", "h100-x", "b300"):
    with pytest.raises(ValueError, match='h100-N, h200-N for cards; or "here"'):
      target(name)


def test_this_machine():
  here = target("here")
  assert here.slice is None and here.hosts == 1 and topology.can_compile(here)
  assert len(here.devices()) == here.chips
  assert here.chip is None and here.hbm is None  # a CPU, whose speed is unknown
