"""Tests that name maps are exact in both directions and report all unlisted tensors."""

import chex
import jax
import numpy as np
import pytest

from ov_convert.name_map import (
  CONV,
  LEAD_1_1,
  SAME,
  TRANSPOSE,
  Dropped,
  Entry,
  Fixed,
  NameMap,
  Transform,
  flatten,
  size,
  unflatten,
)
import ov_models

CONFIG = ov_models.ViTConfig(width=8, depth=2, mlp_dim=12, num_heads=2, patch_size=4, image_size=8)
HEADS = Transform("by heads", shape=lambda s: (*s[:-1], 2, s[-1] // 2))


def entries():
  """All of CONFIG but the key biases, in a made-up world that joins and transposes."""
  yield Entry("stem.weight", ("patch_embed/kernel",), CONV)
  yield Entry("cls", ("cls",), LEAD_1_1)
  yield Entry("norm.weight", ("norm/scale",))
  yield Entry("norm.bias", ("norm/bias",))
  for layer in range(CONFIG.depth):
    kernels = tuple(f"blocks/attn/{n}/kernel" for n in ("query", "key", "value"))
    yield Entry(f"{layer}.qkv.weight", kernels, TRANSPOSE, layer)
    for name in ("query", "value"):
      path = (f"blocks/attn/{name}/bias",)
      yield Entry(f"{layer}.{name}.bias", path, SAME, layer, also=(HEADS,))
    for theirs, ours in (("proj", "attn/out"), ("fc1", "mlp/up"), ("fc2", "mlp/down")):
      yield Entry(f"{layer}.{theirs}.weight", (f"blocks/{ours}/kernel",), TRANSPOSE, layer)
      yield Entry(f"{layer}.{theirs}.bias", (f"blocks/{ours}/bias",), SAME, layer)
    for norm in ("norm1", "norm2"):
      yield Entry(f"{layer}.{norm}.weight", (f"blocks/{norm}/scale",), SAME, layer)
      yield Entry(f"{layer}.{norm}.bias", (f"blocks/{norm}/bias",), SAME, layer)
  for layer in range(CONFIG.depth):
    yield Entry(f"{layer}.key.bias", ("blocks/attn/key/bias",), SAME, layer)


FIXED = (
  Fixed("stem.bias", np.zeros(8, np.float32), "the patch embedding of OpenVision has no bias"),
)
MAP = NameMap("the other world", tuple(entries()), FIXED, ignored={"step": "a counter"})


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  shapes = ov_models.abstract_params(CONFIG)
  return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)


def test_round_trip_is_exact_and_everything_is_where_it_belongs(params):
  flat = MAP.to_theirs(params, CONFIG)
  assert set(flat) == {entry.theirs for entry in MAP.entries} | {"stem.bias"}
  assert size(flat) == ov_models.num_params(CONFIG) + 8
  blocks = params["blocks"]["attn"]
  assert flat["1.qkv.weight"].shape == (24, 8)
  np.testing.assert_array_equal(flat["1.qkv.weight"][8:16], blocks["key"]["kernel"][1].T)
  np.testing.assert_array_equal(
    flat["stem.weight"][5, 2, 1, 3], params["patch_embed"]["kernel"][1, 3, 2, 5]
  )
  assert flat["cls"].shape == (1, 1, 8)
  back = MAP.to_ours(flat | {"step": np.zeros(())}, CONFIG)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  chex.assert_trees_all_equal(back, params)


def test_other_forms_are_read(params):
  flat = MAP.to_theirs(params, CONFIG)
  flat["0.query.bias"] = flat["0.query.bias"].reshape(2, 4)
  chex.assert_trees_all_equal(MAP.to_ours(flat, CONFIG), params)
  flat["0.query.bias"] = flat["0.query.bias"].reshape(4, 2)
  with pytest.raises(ValueError, match=r"0.query.bias is \(4, 2\), expected \(8,\) or \(2, 4\)"):
    MAP.to_ours(flat, CONFIG)


def test_all_mismatches_are_reported_at_once(params):
  flat = MAP.to_theirs(params, CONFIG)
  del flat["norm.bias"], flat["1.fc1.weight"]
  flat["extra"] = np.zeros(3)
  flat["0.qkv.weight"] = flat["0.qkv.weight"].T
  flat["stem.bias"] = np.full(8, 0.5, np.float32)
  with pytest.raises(ValueError) as error:
    MAP.to_ours(flat, CONFIG)
  assert str(error.value).splitlines() == [
    "tensors of the other world do not match the config:",
    "  missing norm.bias",
    "  missing 1.fc1.weight",
    "  unexpected extra (3,)",
    "  0.qkv.weight is (8, 24), expected (24, 8)",
    "  stem.bias differs by 5.0e-01 from the expected value; "
    "the patch embedding of OpenVision has no bias",
  ]
  flat = MAP.to_theirs(params, CONFIG) | {"extra": np.zeros(3)}
  MAP.to_ours(flat, CONFIG, ignore=["extra"])
  del flat["stem.bias"]
  with pytest.raises(ValueError, match=r"missing stem\.bias"):
    MAP.to_ours(flat, CONFIG, ignore=["extra"])
  flat["stem.bias"] = np.zeros(9, np.float32)
  with pytest.raises(ValueError, match=r"stem.bias is \(9,\), expected \(8,\)"):
    MAP.to_ours(flat, CONFIG, ignore=["extra"])
  flat["stem.bias"] = np.full(8, np.nan, np.float32)
  with pytest.raises(ValueError, match="stem.bias differs by nan"):
    MAP.to_ours(flat, CONFIG, ignore=["extra"])


def test_unmapped_parameters_are_an_error(params):
  short = NameMap("it", MAP.entries[:-2])
  with pytest.raises(ValueError, match="it has no counterpart of blocks/attn/key/bias"):
    short.to_theirs(params, CONFIG)
  dropped = NameMap("it", MAP.entries[:-2], dropped=(Dropped("blocks/attn/key/bias", "of no use"),))
  assert "0.key.bias" not in dropped.to_theirs(params, CONFIG)


def test_dropped_covers_a_tensor_or_all_below_a_path():
  assert Dropped("decoder/", "").covers("decoder/head/kernel")
  assert not Dropped("decoder/", "").covers("decoder_norm/scale")
  assert Dropped("bias", "").covers("bias") and not Dropped("bias", "").covers("bias/x")


def test_parameters_that_do_not_fit_the_config_do_not_leave(params):
  params["norm"]["scale"] = np.zeros(9, np.float32)
  with pytest.raises(ValueError, match=r"norm/scale is \(9,\), expected \(8,\)"):
    MAP.to_theirs(params, CONFIG)


def test_flatten_and_back(params):
  flat = flatten(params)
  assert "blocks/attn/key/bias" in flat
  assert jax.tree.structure(unflatten(flat)) == jax.tree.structure(params)
