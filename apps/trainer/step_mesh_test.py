"""Tests that one device, eight devices and accumulation give the same training."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from apps.trainer import state as state_lib
from apps.trainer.augment import AugmentConfig, make_preprocess
from apps.trainer.losses.loss_term import LossOutput
from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.step import make_train_step

B, S, F = 16, 4, 16
JITTERED = AugmentConfig()
CONFIG = OptimizerConfig(1e-2, ScheduleSettings(warmup_steps=2), grad_clip_norm=1.0, ema_decay=0.9)


def init_params(key):
  a, b = jax.random.split(key)
  return {
    "hidden": {"kernel": 0.1 * jax.random.normal(a, (S * S * 3, F)), "bias": jnp.zeros(F)},
    "head": {"kernel": 0.3 * jax.random.normal(b, (F, 1))},
  }


def loss_fn(params, batch, key, ema=None, step=None):
  x = batch["image"].reshape(len(batch["image"]), -1)
  noise = 0.1 * jax.random.normal(key, ())  # a draw for the batch, the same on every device
  hidden = jax.nn.gelu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"] + noise)
  error = (hidden @ params["head"]["kernel"])[:, 0] - batch["y"]
  weight = batch["mask"].sum()
  return LossOutput((error**2 * batch["mask"]).sum() / (weight + 1e-8), weight, {})


def make_batch(step):
  rng = np.random.default_rng(step)
  return {
    "image": rng.integers(0, 256, (B, S, S, 3), np.uint8),
    "index": np.arange(step * B, (step + 1) * B),
    "y": rng.normal(size=B).astype(np.float32),
    "mask": (rng.uniform(size=B) < 0.6).astype(np.float32),
  }


def setup(shape, accumulate=1, augment=JITTERED):
  devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
  mesh = Mesh(devices, ("data", "fsdp"))
  abstract_params = jax.eval_shape(init_params, jax.random.key(0))
  specs = {
    "hidden": {"kernel": P("fsdp", None), "bias": P()},
    "head": {"kernel": P("fsdp", None)},
  }
  param_shardings = jax.tree.map(
    lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
  )
  optimizer = make_optimizer(CONFIG, abstract_params, total_steps=10)
  abstract = state_lib.abstract_state(abstract_params, optimizer.tx, ema=True)
  shardings = state_lib.state_shardings(abstract, param_shardings, mesh)
  state = state_lib.init_state(init_params, jax.random.key(0), optimizer.tx, shardings)
  batch_sharding = NamedSharding(mesh, P(("data", "fsdp")))
  step = make_train_step(
    loss_fn,
    optimizer.tx,
    state_shardings=shardings,
    batch_sharding=batch_sharding,
    seed=5,
    learning_rate=optimizer.learning_rate,
    accumulate=accumulate,
    preprocess=make_preprocess(augment, seed=5),
    ema_decay=CONFIG.ema_decay,
    trainable=optimizer.trainable,
  )
  return state, step, batch_sharding


@functools.cache
def train(shape, accumulate=1, steps=5):
  state, step, sharding = setup(shape, accumulate)
  losses = []
  for i in range(steps):
    state, metrics = step(state, jax.device_put(make_batch(i), sharding))
    losses.append(float(metrics["loss"]))
  return state, losses


def assert_same(a, b):
  # different float32 summation order; five Adam steps of 1e-2 amplify that to about 1e-5.
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.array(x), np.array(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_eight_devices_match_one(shape):
  reference, expected = train((1, 1))
  state, losses = train(shape)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert_same(state, reference)


def test_accumulation_on_eight_devices_matches_one():
  reference, expected = train((1, 1), accumulate=2)
  state, losses = train((2, 4), accumulate=2)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert_same(state, reference)


def test_moments_and_average_are_sharded_like_their_parameters():
  state, _ = train((2, 4))
  adam = state["opt"]["adamw"].inner_state
  for tree in (state["params"], adam.mu, adam.nu, state["ema"]):
    assert tree["hidden"]["kernel"].sharding.spec == P("fsdp", None)
    assert tree["hidden"]["bias"].sharding.is_fully_replicated
    assert tree["hidden"]["kernel"].addressable_shards[0].data.shape == (S * S * 3 // 4, F)
  assert adam.count.sharding.is_fully_replicated


def test_accumulation_moves_no_rows_between_devices():
  def hlo(accumulate):
    plain = AugmentConfig(jitter_probability=0, gray_probability=0)
    state, step, sharding = setup((8, 1), accumulate, plain)
    return step.lower(state, jax.device_put(make_batch(0), sharding)).compile().as_text()

  whole, parts = hlo(1), hlo(2)
  assert "all-reduce" in parts  # of the gradients
  for collective in ("all-to-all", "collective-permute", "all-gather"):
    assert parts.count(collective) <= whole.count(collective), collective


def test_batch_must_divide_by_accumulation_times_devices():
  state, step, sharding = setup((8, 1), accumulate=4)
  with pytest.raises(ValueError, match="16 rows is not a multiple of 32 = accumulate 4 x 8 batch"):
    step(state, jax.device_put(make_batch(0), sharding))
