"""Tests of the optimizer chain: arithmetic of each entry, groups by path, errors."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apps.trainer.optimizer import (
  OptimizerConfig,
  ema_update,
  flatten_paths,
  make_optimizer,
  summarize_groups,
)
from apps.trainer.optimizers import AdamW
from apps.trainer.run_config import ScheduleSettings

L, D = 3, 4
CONSTANT = ScheduleSettings(kind="constant")


def leaf(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def make_params():
  return {
    "encoder": {
      "patch_embed": {"kernel": leaf(2, 2, 3, D)},
      "position_embedding": leaf(5, D),
      "cls": leaf(D),
      "blocks": {"mlp": {"kernel": leaf(L, D, D), "bias": leaf(L, D)}},
      "norm": {"scale": leaf(D), "bias": leaf(D)},
    },
    "decoder": {
      "embed": {"embedding": leaf(7, D)},
      "blocks": {"mlp": {"kernel": leaf(2, D, D), "bias": leaf(2, D)}},
      "head": {"kernel": leaf(D, 7)},
    },
  }


def one_update(config, params, grads, steps=1):
  tx = make_optimizer(config, params, total_steps=10).tx
  state = tx.init(params)
  for _ in range(steps):
    updates, state = jax.jit(tx.update)(grads, state, params)
  return flatten_paths(updates), state


def test_two_steps_of_adamw_by_hand():
  config = OptimizerConfig(0.5, ScheduleSettings(warmup_steps=4), AdamW(mu_dtype="float32"))
  params, grads = make_params(), jax.tree.map(jnp.sin, make_params())
  updates, _ = one_update(config, params, grads, steps=2)
  for path, g in flatten_paths(grads).items():
    # The bias-corrected moments of a constant gradient are g and g^2; schedule(1) = 1 / 4.
    expected = g / (jnp.abs(g) + 1e-8)
    if path.endswith("/kernel"):
      expected += 0.2 * flatten_paths(params)[path]
    # Bias correction of two float32 steps loses a few ulps.
    np.testing.assert_allclose(updates[path], -0.5 * 0.25 * expected, rtol=1e-5, atol=1e-6)


def test_first_step_of_a_warmup_changes_nothing():
  config = OptimizerConfig(1.0, ScheduleSettings(warmup_steps=2))
  updates, _ = one_update(config, make_params(), make_params())
  assert all((u == 0).all() for u in updates.values())


def test_moments_have_the_published_dtypes_and_checkpoint_keys():
  _, state = one_update(OptimizerConfig(1.0), make_params(), make_params())
  adam = flatten_paths(state)
  assert adam["adamw/inner_state/mu/encoder/cls"].dtype == jnp.bfloat16
  assert adam["adamw/inner_state/nu/encoder/cls"].dtype == jnp.float32
  assert {"adamw/inner_state/count", "schedule/count"} <= adam.keys()


def test_default_matches_optax_adam_bitwise():
  params = make_params()
  plain = optax.scale_by_adam(0.9, 0.95, 1e-8, mu_dtype=jnp.bfloat16)
  config = OptimizerConfig(1.0, CONSTANT, weight_decay=0.0)
  for steps in (1, 5):
    updates, state = one_update(config, params, params, steps)
    expected_state = plain.init(params)
    for _ in range(steps):
      expected, expected_state = jax.jit(plain.update)(params, expected_state)
    chex.assert_trees_all_equal(state["adamw"].inner_state, expected_state)
    chex.assert_trees_all_equal(updates, {p: -u for p, u in flatten_paths(expected).items()})


def test_only_kernels_decay():
  optimizer = make_optimizer(OptimizerConfig(1.0), make_params(), 10)
  decayed = {path for path, group in optimizer.groups.items() if group == "decayed"}
  assert decayed == {path for path in optimizer.groups if path.endswith("/kernel")}
  assert "decoder/embed/embedding" not in decayed and "encoder/patch_embed/kernel" in decayed


@pytest.mark.parametrize("scale,clipped", [(0.01, False), (10.0, True)])
def test_global_norm_clip(scale, clipped):
  # Plain Adam hides the size of a constant gradient; eps in its denominator shows it.
  config = OptimizerConfig(1.0, CONSTANT, AdamW(eps=1.0, mu_dtype="float32"), weight_decay=0)
  params = {"w": jnp.zeros(4), "frozen": jnp.zeros(2)}
  grads = {"w": jnp.array([3.0, 4, 0, 0]) * scale, "frozen": jnp.full(2, 1e6)}
  config = dataclasses.replace(config, grad_clip_norm=1.0, frozen=("frozen",))
  updates, _ = one_update(config, params, grads)
  norm = min(5 * scale, 1.0) if clipped else 5 * scale  # the frozen gradient does not count
  g = norm * np.array([0.6, 0.8, 0, 0])
  np.testing.assert_allclose(updates["w"], -g / (np.abs(g) + 1), rtol=1e-5, atol=1e-7)


def test_layer_wise_decay_by_block():
  r = 0.5
  config = OptimizerConfig(
    1.0, CONSTANT, layer_decay=r, layer_decay_regex="^encoder/", weight_decay=0.1
  )
  params, ones = make_params(), jax.tree.map(jnp.ones_like, make_params())
  updates, _ = one_update(config, params, ones)
  plain, _ = one_update(OptimizerConfig(1.0, CONSTANT, weight_decay=0.1), params, ones)
  ratio = {path: np.array(updates[path] / plain[path]) for path in updates}
  for path in ("encoder/patch_embed/kernel", "encoder/position_embedding", "encoder/cls"):
    np.testing.assert_allclose(ratio[path], r ** (L + 1), rtol=1e-5)
  for name in ("kernel", "bias"):
    for i in range(L):
      np.testing.assert_allclose(ratio[f"encoder/blocks/mlp/{name}"][i], r ** (L - i), rtol=1e-5)
  for path in ("encoder/norm/scale", "decoder/blocks/mlp/kernel", "decoder/embed/embedding"):
    np.testing.assert_array_equal(ratio[path], 1.0)


def test_layer_wise_decay_uses_the_depth_of_each_tower():
  config = OptimizerConfig(1.0, CONSTANT, layer_decay=0.5)
  groups = make_optimizer(config, make_params(), 10).groups
  assert groups["encoder/cls"] == "not decayed, lr x 0.0625"  # 3 blocks
  assert groups["decoder/embed/embedding"] == "not decayed, lr x 0.125"  # 2 blocks
  assert groups["decoder/blocks/mlp/kernel"] == "decayed, lr x 0.25..0.5"
  assert groups["decoder/head/kernel"] == "decayed"


def test_lr_multipliers_and_layer_decay():
  config = OptimizerConfig(
    1.0,
    CONSTANT,
    lr_multipliers=(("head", 10.0), ("^decoder/", 0.1)),
    layer_decay=0.5,
    layer_decay_regex="^decoder/",
  )
  groups = make_optimizer(config, make_params(), 10).groups
  assert groups["decoder/head/kernel"] == "decayed, lr x 10"
  assert groups["decoder/embed/embedding"] == "not decayed, lr x 0.0125"
  assert groups["encoder/cls"] == "not decayed"


def test_frozen_parameters_are_not_updated_and_have_no_moments():
  config = OptimizerConfig(1.0, CONSTANT, frozen=("^encoder/",))
  optimizer = make_optimizer(config, make_params(), 10)
  updates, state = one_update(config, make_params(), make_params())
  assert all((u == 0).all() for path, u in updates.items() if path.startswith("encoder/"))
  assert all((u != 0).any() for path, u in updates.items() if path.startswith("decoder/"))
  moments = [path for path in flatten_paths(state) if path.startswith("adamw/inner_state/mu/")]
  assert moments and all("/decoder/" in path for path in moments)
  assert (
    optimizer.trainable["decoder"]["head"]["kernel"] and not optimizer.trainable["encoder"]["cls"]
  )
  lines = summarize_groups(optimizer.groups)
  assert "frozen: 7 arrays (encoder/blocks/mlp/bias, " in lines


def test_learning_rate_is_rate_times_schedule():
  optimizer = make_optimizer(
    OptimizerConfig(3.0, ScheduleSettings(warmup_steps=4)), make_params(), 8
  )
  np.testing.assert_allclose([optimizer.learning_rate(s) for s in (0, 2, 4, 8)], [0, 1.5, 3, 0])


def test_ema_decay_warms_up():
  ema, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2, jnp.bfloat16)}
  first = ema_update(ema, params, 0.999, jnp.int32(0))
  late = ema_update(ema, params, 0.999, jnp.int32(10**6))
  np.testing.assert_allclose(first["w"], 1 - 1 / 10, rtol=1e-6)
  np.testing.assert_allclose(late["w"], 1 - 0.999, rtol=1e-4)
  chex.assert_trees_all_equal_dtypes(first, {"w": jnp.zeros(2, jnp.float32)})


@pytest.mark.parametrize(
  "kwargs,message",
  [
    (
      dict(frozen=("^encdoer/",)),
      "frozen regex '.encdoer/' matches no parameter; examples of paths",
    ),
    (dict(lr_multipliers=(("heads$", 2.0),)), "lr_multipliers regex 'heads.' matches no parameter"),
    (dict(frozen=("",)), "freezes every parameter"),
    (dict(layer_decay=0.5, layer_decay_regex="^text/"), "finds no stacked `blocks/`"),
  ],
)
def test_error_messages(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_optimizer(OptimizerConfig(1.0, **kwargs), make_params(), 10)


def test_last_blocks_keep_the_bits_of_the_others():
  config = OptimizerConfig(
    1.0, CONSTANT, frozen=("/(patch_embed|cls)",), last_blocks=(("^encoder/", 1),)
  )
  params = make_params()
  kernel = params["encoder"]["blocks"]["mlp"]["kernel"].at[0, 0, 0].set(-0.0)
  params["encoder"]["blocks"]["mlp"]["kernel"] = kernel
  optimizer = make_optimizer(config, params, total_steps=10)
  assert optimizer.groups["encoder/blocks/mlp/kernel"] == "decayed, lr x 0..1"
  trained = optimizer.trainable["encoder"]["blocks"]["mlp"]["kernel"]
  np.testing.assert_array_equal(trained, np.array([False, False, True]).reshape(3, 1, 1))
  for sign in (1, -1):
    grads = jax.tree.map(functools.partial(jnp.multiply, sign), jax.tree.map(jnp.cos, params))
    updates, _ = one_update(config, params, grads)
    for path, old in flatten_paths(params).items():
      new = np.asarray(old + updates[path])
      frozen = slice(0, 2) if path.startswith("encoder/blocks") else slice(0, 0)
      if "patch_embed" in path or "cls" in path:
        frozen = slice(None)
      assert new[frozen].tobytes() == np.asarray(old)[frozen].tobytes(), path
      if frozen != slice(None):
        assert (new[frozen.stop :] != old[frozen.stop :]).any(), path


def test_last_blocks_must_match_stacked_parameters():
  config = OptimizerConfig(1.0, last_blocks=(("^encoder/norm", 1),))
  with pytest.raises(ValueError, match="last_blocks regex '.encoder/norm' matches no parameter"):
    make_optimizer(config, make_params(), total_steps=10)
