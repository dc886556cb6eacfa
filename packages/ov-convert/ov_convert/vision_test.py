"""Tests of MLP ratios and positions as stored by other libraries."""

import jax.numpy as jnp
import numpy as np
import pytest

from ov_convert import vision
import ov_models


def test_ratios_give_back_the_width():
  # Plain quotients do not.
  assert int(7 * (61 / 7)) == 60
  for width in range(1, 200):
    for mlp_dim in range(1, 5 * width, 3):
      assert int(width * vision.mlp_ratio(width, mlp_dim)) == mlp_dim
  assert int(1152 * vision.mlp_ratio(1152, 4304)) == 4304


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_computed_positions_are_known_again(dtype):
  config = ov_models.ViTConfig(
    width=64, depth=1, mlp_dim=4, num_heads=1, patch_size=14, image_size=384
  )
  table = vision.position_table(config)
  assert table.shape == (1 + 27 * 27, 64)
  table = table.astype(jnp.dtype(dtype)).astype(np.float32)
  assert vision.kind_of_positions(table, 384, 14) == "sincos2d"
  step = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-9}[dtype]
  for row, column in ((0, 3), (1, 40), (729, 5)):  # a cls token with a position, other positions
    other = table.copy()
    other[row, column] += step
    assert vision.kind_of_positions(other, 384, 14) == "learned"


def test_other_tables_are_learned():
  rng = np.random.default_rng(0)
  for shape in ((10, 16), (10, 18), (10, 4), (9, 16), (0, 0)):
    table = rng.normal(size=shape).astype(np.float32)
    assert vision.kind_of_positions(table, 12, 4) == "learned"
  # MAE's table of the same grid divides the exponent by K, not K - 1, and starts with the rows.
  y, x = np.divmod(np.arange(9), 3)
  omega = 10000.0 ** -(np.arange(4) / 4)
  angles = [position[:, None] * omega for position in (y, x)]
  halves = [np.concatenate([np.sin(a), np.cos(a)], axis=1) for a in angles]
  table = np.concatenate([np.zeros((1, 16)), np.concatenate(halves, axis=1)]).astype(np.float32)
  assert vision.kind_of_positions(table, 12, 4) == "learned"


def test_fields_that_differ_are_listed():
  fields = {"a": 1, "b": None, "c": 3, "d": 0, "e": "x"}
  found = vision.field_mismatches(fields, {"a": 2, "b": None, "z": 5}, {"c"}, "cfg.")
  assert found == ["cfg.a=1 (must be 2)", "cfg.e='x' (unknown)"]
