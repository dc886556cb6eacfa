"""What lives at the peak: of a program for this machine, and of a text as TPUs have it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tools.preflight import hlo, peak

SIZE = 512 * 512 * 4


def _compiled(function, folder: Path, *shapes: tuple[int, ...]):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = (
    jax.jit(function).lower(*arguments).compile(compiler_options={"xla_dump_to": str(folder)})
  )
  return compiled, peak.at_peak(folder, hlo.parse(compiled.as_text()))


def test_products_that_wait_for_each_other(tmp_path: Path):
  """Three products are needed by the fourth step, and fill what the compiler set apart."""

  def function(x):
    a = x @ x
    b = a @ x
    c = b @ a
    return (c @ b) @ a

  compiled, held = _compiled(function, tmp_path, (512, 512))
  analysis = compiled.memory_analysis()
  total = sum(one.bytes for one in held)
  assert total >= 3 * SIZE and all(one.bytes % SIZE == 0 for one in held)
  assert held[0].array == "f32[512,512]" and "dot_general" in held[0].op_name
  assert __file__.rpartition("/")[2] in held[0].source
  assert total == pytest.approx(analysis.temp_size_in_bytes, abs=2**16)


def test_the_state_of_a_loop_is_there_once(tmp_path: Path):
  def function(x):
    return jax.lax.fori_loop(0, 5, lambda _, s: jnp.tanh(s @ x), x).sum()

  compiled, held = _compiled(function, tmp_path, (512, 512))
  # The state, which is five values of the compiler in one place, and the product that comes next.
  assert sum(one.bytes for one in held) == 2 * SIZE
  apart = compiled.memory_analysis().temp_size_in_bytes
  assert apart == pytest.approx(2 * SIZE, abs=2**16)


ASSIGNMENT = """BufferAssignment:
allocation 0: size 400000, parameter 0, shape |f32[100000]| at ShapeIndex {}:
 value: <1 p @0> (size=400000,offset=0): f32[100000]{0:T(1024)}
allocation 1: size 900000, preallocated-temp:
 value: <7 first{} @0> (size=300000,offset=0): f32[75000]{0:T(1024)}
 value: <8 loop{1} (phi) @0> (size=300000,offset=0): f32[75000]{0:T(1024)}
 value: <9 second @0> (size=200000,offset=300000): (bf16[100000]{0}, s32[])
 value: <10 late @0> (size=600000,offset=300000): f32[150000]{0:T(1024)}
 value: <11 small @0> (size=512,offset=500000): f32[128]{0:T(1024)}
allocation 2: size 134217728, color 3, preallocated-temp:
 value: <12 fast @3> (size=8000000,offset=0): f32[2000000]{0:T(1024)S(3)}
"""
LIVE = """HloLiveRange (max 40):
  BufferLiveRange:
    first{}:1-3
    loop{1}:3-20
    second{}:4-9
    late{}:10-12
    small{}:1-20
    fast{}:1-40
"""
PROGRAM = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[100000]) -> f32[75000] {
  %p = f32[100000]{0} parameter(0)
  %first = f32[75000]{0} slice(%p), slice={[0:75000]}, metadata={METADATA}
  ROOT %loop = f32[75000]{0} copy(%first)
}
""".replace("METADATA", 'op_name="jit(f)/slice" source_file="f.py" source_line=3')


def test_places_shared_and_memories_apart(tmp_path: Path):
  (tmp_path / "m.after-buffer-assignment.txt").write_text(ASSIGNMENT)
  (tmp_path / "m.after-live-range.txt").write_text(LIVE)
  program = hlo.parse(PROGRAM)
  # At 10 live `late` and the loop's state; at 4 it would be `second` and that state.
  assert peak.at_peak(tmp_path, program) == [
    peak.Held(600_000, "f32[150000]", "", ""),
    peak.Held(300_000, "f32[75000]", "", ""),
  ]
  (tmp_path / "m.after-live-range.txt").write_text(LIVE.replace("late{}:10-12", "late{}:3-3"))
  # At 3 the state begins where `first` is, which tells where it comes from.
  assert peak.at_peak(tmp_path, program)[1] == peak.Held(
    300_000, "f32[75000]", "f.py:3", "jit(f)/slice"
  )


def test_grouped():
  held = [
    peak.Held(4, "a", "f:1", "x"),
    peak.Held(3, "b", "f:2", "y"),
    peak.Held(3, "b", "f:2", "y"),
  ]
  assert peak.grouped(held, 1) == [(3, "b", 2, "f:2", "y")]


def test_another_way_of_telling(tmp_path: Path):
  assert peak.at_peak(tmp_path, hlo.parse(PROGRAM)) is None
  (tmp_path / "m.after-buffer-assignment.txt").write_text(ASSIGNMENT)
  assert peak.at_peak(tmp_path, hlo.parse(PROGRAM)) is None
