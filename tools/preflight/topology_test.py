"""Cloud names, shapes of slices, and which slice stands in for which."""

import pytest

from tools.preflight import topology
from tools.preflight.topology import CHIPS, parse, slice_shape, smallest, target


@pytest.mark.parametrize(
  "name, chips, shape, hosts",
  [
    ("v4-8", 4, (2, 2, 1), 1),
    ("v4-16", 8, (2, 2, 2), 2),
    ("v4-64", 32, (2, 4, 4), 8),
    ("v4-512", 256, (4, 8, 8), 64),
    ("v5p-8", 4, (2, 2, 1), 1),
    ("v5p-2048", 1024, (8, 8, 16), 256),
    ("v5litepod-1", 1, (1, 1), 1),
    ("v5litepod-16", 16, (4, 4), 4),
    ("v5e-256", 256, (16, 16), 64),
    ("v6e-8", 8, (2, 4), 2),
  ],
)
def test_names(name: str, chips: int, shape: tuple[int, ...], hosts: int):
  found = parse(name)
  assert (found.chips, found.shape, found.hosts) == (chips, shape, hosts)
  assert found.name == name.replace("v5litepod", "v5e")


def test_slices():
  found = parse("v5e-16", 4)
  assert (found.chips, found.hosts, found.name) == (64, 16, "4 x v5e-16")


@pytest.mark.parametrize(
  "name, slices, message",
  [
    ("v4", 1, "expected a cloud name such as v4-512"),
    ("tpu-8", 1, "expected a cloud name"),
    ("v4-7", 1, "v4 comes as v4-8, v4-16"),
    ("v4-24", 1, "v4 comes as"),
    ("v4-16384", 1, "v4-8192$"),
    ("v5e-512", 1, "v5e-256$"),
    ("v5e-2", 1, "v5e comes as v5e-1, v5e-4"),
    ("v5e-16", 0, "--slices=0"),
  ],
)
def test_names_that_are_none(name: str, slices: int, message: str):
  with pytest.raises(ValueError, match=message):
    parse(name, slices)


def test_shapes_hold_all_chips():
  for chip in CHIPS.values():
    for exponent in range(2, 9):
      shape = slice_shape(2**exponent, chip)
      assert shape is not None and len(shape) == chip.dims
      assert max(shape) <= 2 * max(min(shape), 2)  # near a cube


def test_what_stands_in():
  v4 = CHIPS["v4"]
  assert [smallest(v4, n).chips for n in (1, 2, 4, 8, 32)] == [4, 4, 4, 8, 32]  # type: ignore[union-attr]
  assert smallest(CHIPS["v5e"], 3) is None


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(topology, "has_libtpu", lambda: False)
  wanted = target("v4-512")
  assert wanted.chips == 256 and not topology.can_compile(wanted)
  with pytest.raises(ValueError, match="compiling for v4-512 needs libtpu.*OV_EXTRAS=tpu"):
    wanted.devices()


def test_this_machine():
  here = target("here")
  assert here.topology is None and here.hosts == 1 and topology.can_compile(here)
  assert len(here.devices()) == here.chips
  assert here.chip is None and here.hbm is None  # a CPU: no table of its speed
