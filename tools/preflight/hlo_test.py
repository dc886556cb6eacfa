"""The text of programs: what it holds, how often it runs, where it comes from."""

import jax
import jax.numpy as jnp
import pytest

from tools.preflight import hlo
from tools.preflight.testing import TEXT


def test_instructions():
  program = hlo.parse(TEXT)
  assert program.entry == "main" and list(program.computations) == [
    "fused", "body", "condition", "main",
  ]  # fmt: skip
  times = {one.name: count for one, count in program.executed(inside=True)}
  assert times["sum"] == times["loop"] == 1
  assert times["layer"] == times["slice.1"] == times["less"] == 12
  outside = {one.name for one, _ in program.executed()}
  assert "layer" in outside and "slice.1" not in outside  # it is inside a fusion
  assert program.unknown_loops == []


def test_sizes_and_sources():
  program = hlo.parse(TEXT)
  found = {one.name: one for one, _ in program.executed()}
  assert found["sum"].bytes == 12 * 8 * 4 * 4
  assert found["b"].bytes == 12
  assert found["layer"].bytes == 0  # on the chip, not in main memory
  assert found["loop"].bytes == 4 + 12 * 8 * 4 * 4
  assert program.source(found["sum"]) == "/src/apps/trainer/step.py:169"
  assert program.source(found["layer"]) == "/src/packages/ov-models/ov_models/blocks.py:164"
  assert found["layer"].op_name == "jit(update)/while/body/slice"
  assert program.source(found["a"]) == ""


@pytest.mark.parametrize(
  "shape, size",
  [
    ("pred[3]", 3),
    ("u8[2,2]{1,0}", 4),
    ("f8e4m3fn[8]", 8),
    ("bf16[]", 2),
    ("(f32[2,3]{1,0:T(8,128)}, s32[], token[])", 28),
    ("f32[2]{0:T(128)S(5)}", 0),
  ],
)
def test_bytes(shape: str, size: int):
  assert sum(array.bytes for array in hlo.arrays_of(shape) if array.space == 0) == size


def test_a_loop_of_unknown_length_counts_once():
  unclear = TEXT.replace("direction=LT", "direction=NE")
  program = hlo.parse(unclear)
  assert program.unknown_loops == ["loop"]
  assert {one.name: count for one, count in program.executed()}["layer"] == 1


def test_no_program():
  with pytest.raises(ValueError, match="no entry computation"):
    hlo.parse("HloModule empty\n")


def test_what_this_compiler_writes():
  """A scan of 7 layers: its products run 7 times, and its lines are those of this file."""

  def run(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 64), (7, 64, 64))]
  text = jax.jit(run).lower(*shapes).compile().as_text()
  assert text is not None
  program = hlo.parse(text)
  products = [
    (one, times)
    for one, times in program.executed(inside=True)
    if one.op_name.endswith("dot_general") and any(a.dims == (64, 64) for a in one.arrays)
  ]
  assert products and {times for _, times in products} == {7}
  assert any("hlo_test.py:" in program.source(one) for one, _ in products)
  assert program.unknown_loops == []
