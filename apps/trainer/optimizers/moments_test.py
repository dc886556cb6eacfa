"""Tests of memory-efficient moments: rounding, training compared with Adam, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apps.trainer import state as state_lib
from apps.trainer.checkpoint import CheckpointError, Checkpoints
from apps.trainer.optimizer import OptimizerConfig, flatten_paths, make_optimizer
from apps.trainer.optimizers import AdamW, moments
from apps.trainer.run_config import ScheduleSettings
import ov_models

L, D, F = 2, 128, 256
OPTIONS = [("bfloat16", "factored"), ("bfloat16", "int8"), ("int8", "int8"), ("int8", "factored")]
CONSTANT = ScheduleSettings(kind="constant")


def adam(mu_dtype="float32", second_moment="full", b1=0.9, b2=0.95):
  stacked = lambda path: "blocks" in jax.tree_util.keystr(tuple(path))
  return moments.scale_by_adam(b1, b2, 1e-8, mu_dtype, second_moment, stacked)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(tx, grads):
  """Return the updates of every step, and the last state."""
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  out = []
  for g in grads:
    updates, state = update(g, state)
    out.append(updates)
  return out, state


@pytest.mark.parametrize("option", [("float32", "factored"), ("int8", "int8")])
def test_small_arrays_use_plain_adam(option):
  grads = [{"bias": normal(i, D), "blocks": {"scale": normal(i, 64, D)}} for i in range(4)]
  got, _ = run(adam(*option), grads)
  expected, _ = run(optax.scale_by_adam(0.9, 0.95), grads)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    # The same float32 arithmetic, fused otherwise: where m is near 0, 2^-24 of its terms.
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_first_step_by_hand(option):
  """With bias correction, m is g, and v is g^2 or the means of its rows and columns."""
  g = normal(0, D, F)
  v = g.astype(np.float64) ** 2
  if option[1] == "factored":
    v = v.mean(1, keepdims=True) * v.mean(0, keepdims=True) / v.mean()
  (first,), _ = run(adam(*option), [{"w": g}])
  # float32: a few roundings, and 1 - b^1 cancels: 2^-24 / 0.05.
  np.testing.assert_allclose(first["w"], g / (np.sqrt(v) + 1e-8), rtol=2e-6)


def test_factoring_is_exact_for_rank_one_squares():
  """With g^2 = a_i b_j in each layer, factoring is exact."""
  a, b, layer = np.exp(normal(0, L, D, 1)), np.exp(normal(1, L, 1, F)), np.array([1e-4, 10.0])
  size = np.sqrt(a * b).astype(np.float32) * layer[:, None, None].astype(np.float32)
  grads = [{"blocks": {"w": size * np.sign(normal(i, L, D, F))}} for i in range(6)]
  got, state = run(adam("float32", "factored"), grads)
  expected, _ = run(optax.scale_by_adam(0.9, 0.95), grads)
  for x, y in zip(got, expected, strict=True):
    # Means of 256 float32 numbers: a few units of 2^-24 more than Adam's own.
    np.testing.assert_allclose(x["blocks"]["w"], y["blocks"]["w"], rtol=1e-5, atol=1e-6)
  assert state.nu["rows"]["blocks"]["w"].shape == (L, D, 1)
  assert state.nu["columns"]["blocks"]["w"].shape == (L, 1, F)
  assert not jax.tree.leaves(state.nu.get("value", ()))


@pytest.mark.parametrize(
  "shape,first,axis",
  [
    ((D, F), 0, 1),
    ((L, D, F), 1, 2),
    ((L, 768, 12, 64), 1, 2),  # query: 768 x (12 64)
    ((L, 12, 64, 768), 1, 3),  # out: (12 64) x 768
    ((16, 16, 3, 768), 0, 3),  # patches: (16 16 3) x 768
    ((L, 12, 64), 1, None),  # biases of attention
    ((L, D), 1, None),
    ((D, 64), 0, None),
    ((F,), 0, None),
    ((), 0, None),
  ],
)
def test_split_axis(shape, first, axis):
  assert moments.split_axis(shape, first) == axis


@pytest.mark.parametrize(
  "shape,first,coded,block",
  [
    ((L, 768, 12, 64), 1, True, 64),
    ((L, 768, 3072), 1, True, 96),
    ((1024, 4096), 0, True, 128),
    ((32, 128), 0, True, 128),
    ((31, 128), 0, False, 128),
    ((64, 31, 128), 1, False, 128),  # 64 layers of an array that is small
    ((32003, 16), 0, False, 16),  # scales would add a quarter
    ((64, 1077), 0, True, 1077),  # odd: one scale for the row
  ],
)
def test_quantized_arrays_and_block_sizes(shape, first, coded, block):
  assert moments.can_code(shape, first) == coded
  assert moments.block_size(shape) == block


def spread(dtype, *shape):
  """Return numbers of five magnitudes; squares for unsigned dtypes."""
  x = normal(0, *shape) * 10.0 ** np.random.default_rng(1).uniform(-5, 0, shape).astype(np.float32)
  return jnp.asarray(x if dtype == "int8" else x * x)


def quanta(dtype, x, scale):
  """Return the values (q / n)^p * scale of the codes adjacent to x, in float64."""
  levels, power = {"int8": (127, 2), "uint8": (255, 4)}[dtype]
  share = np.abs(np.asarray(x, np.float64)) / scale
  low = np.minimum(np.floor(share ** (1 / power) * levels), levels - 1)
  return (low / levels) ** power * scale, ((low + 1) / levels) ** power * scale


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_rounding_is_to_adjacent_codes_and_unbiased(dtype):
  block, steps = 64, 1000
  x = spread(dtype, 16, 4 * block)
  pack = jax.jit(lambda x, step: moments.encode(x, jnp.dtype(dtype), block, step))
  unpack = jax.jit(moments.decode)
  kept = [pack(x, jnp.int32(step)) for step in range(steps)]
  assert kept[0]["codes"].shape == x.shape and kept[0]["scales"].shape == (16, 4)
  assert kept[0]["codes"].dtype == dtype and kept[0]["scales"].dtype == jnp.float32
  scale = np.repeat(np.asarray(kept[0]["scales"], np.float64), block, axis=1)
  low, high = quanta(dtype, x, scale)
  floor = scale / 255**4 if dtype == "uint8" else 0 * scale  # v > 0 stays > 0
  slack = 1e-5 * scale ** (1 / 2) * np.abs(x) ** (1 / 2) + 1e-12  # float32 at a code's edge
  found = np.stack([unpack(k) for k in kept])
  assert (np.sign(found) * np.sign(x) >= 0).all()
  sizes = np.abs(found)
  assert (sizes >= np.maximum(low, floor) - slack).all()
  assert (sizes <= np.maximum(high, floor) + slack).all()
  # Multiples of an irrational number leave no gap over 3 / steps; the mean is off by less than
  # a hundredth of a quantum. Below the smallest code v is rounded up.
  off = np.abs(sizes.mean(0) - np.maximum(np.abs(x), floor))
  assert (off <= 0.01 * (high - low) + slack).all()
  largest = np.abs(x) == scale
  np.testing.assert_array_equal(sizes[:, largest], np.abs(x)[largest][None].repeat(steps, 0))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_zeros_stay_zeros(dtype):
  x = jnp.zeros((2, 64)).at[1, 3].set(2.0)
  kept = moments.encode(x, jnp.dtype(dtype), 64, jnp.int32(1))
  np.testing.assert_array_equal(moments.decode(kept), x)


def loss(params, key):
  """Return the loss of a regression that two hidden layers can learn; inputs of two magnitudes."""
  x = jax.random.normal(key, (32, D)) * jnp.logspace(-1, 0, D)
  y = jnp.tanh(x @ normal(7, D, 4) / 4)
  hidden = x @ params["in"]
  for w in params["blocks"]["w"]:
    hidden = hidden + jax.nn.gelu(hidden @ w)
  return jnp.mean((hidden @ params["out"] - y) ** 2)


@functools.cache
def losses(mu_dtype, second_moment, b2=0.95, steps=150):
  params = {
    "in": jnp.asarray(normal(1, D, D)) / D**0.5,
    "blocks": {"w": jnp.asarray(normal(2, L, D, D)) / D},
    "out": jnp.asarray(normal(3, D, 4)) / D**0.5,
  }
  rule = AdamW(b2=b2, mu_dtype=mu_dtype, second_moment=second_moment)
  config = OptimizerConfig(3e-3, CONSTANT, rule, weight_decay=0.0)
  tx = make_optimizer(config, params, steps).tx

  def step(carry, key):
    params, opt = carry
    value, grads = jax.value_and_grad(loss)(params, key)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), value

  keys = jax.random.split(jax.random.key(0), steps)
  train = jax.jit(lambda start: jax.lax.scan(step, start, keys)[1])
  return np.asarray(train((params, tx.init(params))))


@pytest.mark.parametrize("option,b2", [*((o, 0.95) for o in OPTIONS), (("int8", "int8"), 0.999)])
def test_learns_like_adam(option, b2):
  got, expected = losses(*option, b2), losses("float32", "full", b2)
  assert expected[-50:].mean() < 0.2 * expected[0]
  # Measured: codes change the mean by 0.03%, factors by 0.5%; another b2, 0.999, by 6 to 7%.
  tolerance = 0.01 if option[1] == "factored" else 0.003
  for part in (slice(50, 100), slice(100, 150)):
    np.testing.assert_allclose(got[part].mean(), expected[part].mean(), rtol=tolerance)


def test_updates_decay_without_gradients():
  """Half of each block gets no gradient after 50 steps; the other half still does.

  Adam's updates are at 1e-5 after 150 steps more. Rounded to the nearest code they stay at 0.3: m
  is too small a part of its block to change by half a quantum.
  """
  tx = adam("int8", "int8")
  state, update = tx.init({"w": jnp.zeros((64, D))}), jax.jit(tx.update)
  sizes = np.tile(np.logspace(-3, 0, D // 2, dtype=np.float32), 2)
  largest = []
  for i in range(250):
    g = (normal(i, 64, D) + 0.3) * sizes
    g[:, D // 2 :] *= i < 50
    updates, state = update({"w": g}, state)
    largest.append(np.abs(updates["w"][:, D // 2 :]).max())
  assert max(largest[200:]) < 0.01
  # Codes at most double what Adam's bound on |m| / sqrt(v) is, 0.9 / sqrt(1 - 0.9^2 / 0.95) = 2.3.
  assert max(largest) < 4.6


@functools.cache
def captioner():
  config = ov_models.VisionLanguageConfig.openvision2("L/14", "L", image_size=224)
  return ov_models.abstract_params(config)


@pytest.mark.parametrize(
  "option,low,high",
  [
    (("float32", "full"), 8, 8.001),
    (("bfloat16", "full"), 6, 6.001),
    (("bfloat16", "factored"), 2, 2.02),
    (("bfloat16", "int8"), 3.03, 3.06),
    (("int8", "int8"), 2.06, 2.10),
    (("int8", "factored"), 1.03, 1.06),
  ],
)
def test_bytes_per_parameter(option, low, high):
  """A scale needs 4 bytes per 64 to 128 entries; small arrays need 4 or 8 bytes per entry."""
  config = OptimizerConfig(1.0, rule=AdamW(mu_dtype=option[0], second_moment=option[1]))
  tx = make_optimizer(config, captioner(), 10).tx
  size = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, captioner()))
  )
  assert low <= size / ov_models.num_params(captioner()) < high


def make_state(option):
  params = {
    "blocks": {"w": normal(0, L, D, F), "bias": normal(1, L, F)},
    "frozen": {"w": normal(2, D, F)},
  }
  params = jax.tree.map(jnp.asarray, params)
  config = OptimizerConfig(
    1e-3, CONSTANT, AdamW(mu_dtype=option[0], second_moment=option[1]), frozen=("^frozen/",)
  )
  tx = make_optimizer(config, params, 10).tx
  return state_lib.new_state(params, tx), tx


def advance(state, tx, steps):
  update = jax.jit(tx.update)
  for _ in range(steps):
    grads = jax.tree.map(lambda p: jnp.sin(p) - 0.1, state["params"])
    updates, opt = update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {"params": params, "opt": opt, "step": state["step"] + 1}
  return state


def abstract(state):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.mark.parametrize("option", [("bfloat16", "factored"), ("int8", "int8")])
def test_resume_is_bitwise_exact(tmp_path, option):
  start, tx = make_state(option)
  halfway = advance(start, tx, 3)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, halfway, {})
    restored = checkpoints.restore(abstract(start)).state
  expected, got = advance(halfway, tx, 3), advance(restored, tx, 3)
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("option", [("bfloat16", "factored"), ("int8", "int8")])
def test_checkpoint_with_other_moments_is_rejected(tmp_path, option):
  (plain, _), (other, _) = make_state(("bfloat16", "full")), make_state(option)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, plain, {})
    with pytest.raises(CheckpointError) as error:
      checkpoints.restore(abstract(other))
  message = str(error.value)
  assert "/1 has a different optimizer state than this run, in 1" in message
  assert "such as opt/adamw/inner_state/step: missing, expected int32[]. Keep config." in message
  assert "\n" not in message


def test_checkpoint_with_other_mu_dtype_is_rejected(tmp_path):
  (saved, _), (other, _) = make_state(("float32", "full")), make_state(("bfloat16", "full"))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, saved, {})
    with pytest.raises(CheckpointError, match=r"in 2 arrays, such as opt.*float32\[2, 256\], exp"):
      checkpoints.restore(abstract(other))


@pytest.mark.parametrize("option", OPTIONS)
def test_frozen_parameters_have_no_state(option):
  state, tx = make_state(option)
  state = advance(state, tx, 1)
  kept = [path for path in flatten_paths(state["opt"]) if path.startswith("adamw/")]
  assert any("/blocks/w" in path for path in kept) and not any("frozen" in path for path in kept)
  np.testing.assert_array_equal(state["params"]["frozen"]["w"], normal(2, D, F))
