"""Tests of the train step on one device: arithmetic, accumulation, donation, tracing, NaN steps."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from apps.trainer import state as state_lib
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.losses.loss_term import LossOutput
from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.optimizers import AdamW
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.step import make_train_step

D, F = 8, 16
CONFIG = OptimizerConfig(0.01, ScheduleSettings(kind="constant"), AdamW(mu_dtype="float32"))


def init_params(key):
  a, b = jax.random.split(key)
  return {
    "hidden": {"kernel": 0.3 * jax.random.normal(a, (D, F)), "bias": jnp.zeros(F)},
    "head": {"kernel": 0.3 * jax.random.normal(b, (F, 1))},
  }


def loss_fn(params, batch, key, ema=None, step=None):
  """Masked mean square error; the weight is the number of masked rows, like caption tokens."""
  hidden = jax.nn.gelu(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  error = (hidden @ params["head"]["kernel"])[:, 0] - batch["y"]
  weight = batch["mask"].sum()
  loss = (error**2 * batch["mask"]).sum() / (weight + 1e-8)
  return LossOutput(loss, weight, {"draw": jax.random.uniform(key), "twice": 2 * loss})


def make_batch(rows=24, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, D)).astype(np.float32)
  mask = (rng.uniform(size=rows) < 0.6).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(axis=1)), "mask": mask}


@functools.cache
def build(config, loss, **kwargs):
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  replicated = NamedSharding(mesh, PartitionSpec())
  abstract_params = jax.eval_shape(init_params, jax.random.key(0))
  optimizer = make_optimizer(config, abstract_params, total_steps=100)
  abstract = state_lib.abstract_state(
    abstract_params, optimizer.tx, ema=config.ema_decay is not None
  )
  param_shardings = jax.tree.map(lambda _: replicated, abstract_params)
  shardings = state_lib.state_shardings(abstract, param_shardings, mesh)
  step = make_train_step(
    loss,
    optimizer.tx,
    state_shardings=shardings,
    batch_sharding=NamedSharding(mesh, PartitionSpec("data")),
    seed=3,
    learning_rate=optimizer.learning_rate,
    ema_decay=config.ema_decay,
    trainable=optimizer.trainable,
    **kwargs,
  )
  state = state_lib.init_state(init_params, jax.random.key(0), optimizer.tx, shardings)
  return jax.device_get(state), shardings, step, optimizer


def setup(config=CONFIG, loss=loss_fn, **kwargs):
  state, shardings, step, optimizer = build(config, loss, **kwargs)
  return jax.device_put(state, shardings), step, optimizer


def test_a_step_is_gradient_then_optax():
  state, step, optimizer = setup()
  batch = make_batch()
  expected_loss, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, jax.random.key(0)).loss)(
    state["params"]
  )
  updates, _ = optimizer.tx.update(grads, state["opt"], state["params"])
  expected = jax.device_get(optax.apply_updates(state["params"], updates))
  state, metrics = step(state, batch)
  chex.assert_trees_all_close(state["params"], expected, rtol=1e-6, atol=1e-7)
  assert int(state["step"]) == 1
  np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
  np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(updates), rtol=1e-6)
  np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(expected), rtol=1e-6)
  np.testing.assert_allclose(metrics["learning_rate"], 0.01)
  np.testing.assert_allclose(metrics["twice"], 2 * expected_loss, rtol=1e-6)
  assert metrics["weight"] == batch["mask"].sum() and metrics["nonfinite"] == 0


@pytest.mark.parametrize("k", [4, 6])
def test_accumulation_matches_full_batch_with_unequal_weights(k):
  batch = make_batch()
  batch["mask"][1::k] = 0.0  # microbatch 1 holds nothing
  assert len({batch["mask"][j::k].sum() for j in range(k)}) > 1
  whole, step, _ = setup()
  parts, accumulating, _ = setup(accumulate=k)
  for _ in range(3):
    whole, expected = step(whole, batch)
    parts, metrics = accumulating(parts, batch)
  # Different summation order in float32; Adam's first steps amplify by up to sqrt(1 / g^2).
  chex.assert_trees_all_close(parts["params"], whole["params"], rtol=1e-5, atol=1e-6)
  for name in ("loss", "weight", "grad_norm", "twice"):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_batch_without_weight_only_decays(k):
  state, step, _ = setup(accumulate=k)
  before = jax.device_get(state["params"])
  state, metrics = step(state, make_batch() | {"mask": np.zeros(24, np.float32)})
  assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["nonfinite"] == 0
  np.testing.assert_array_equal(state["params"]["hidden"]["bias"], before["hidden"]["bias"])


@pytest.mark.parametrize("k", [1, 4])
def test_nan_step_keeps_state(k):
  state, step, _ = setup(OptimizerConfig(0.01, ema_decay=0.9), accumulate=k)
  state, _ = step(state, make_batch())
  before = jax.device_get(state)
  bad = make_batch(seed=1)
  bad["x"][7, 3] = np.inf
  bad["mask"][7] = 1.0
  state, metrics = step(state, bad)
  assert metrics["nonfinite"] == 1
  chex.assert_trees_all_equal(jax.device_get(state), before)
  state, metrics = step(state, make_batch(seed=2))
  assert metrics["nonfinite"] == 0 and int(state["step"]) == 2


def test_nan_gradient_with_finite_loss_is_detected():
  def loss(params, batch, key, ema, step):
    x = params["hidden"]["bias"][0]  # sqrt has the gradient inf * 0 = nan at 0
    return LossOutput(jnp.sqrt(x * x), jnp.float32(1), {})

  state, step, _ = setup(loss=loss)
  _, metrics = step(state, make_batch())
  assert np.isfinite(metrics["loss"]) and metrics["nonfinite"] == 1


def test_one_trace_over_several_steps_and_no_donation_warning():
  state, step, _ = setup(loss=chex.assert_max_traces(loss_fn, n=1), accumulate=2)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for seed in range(4):
      old = state
      state, _ = step(state, make_batch(seed=seed))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_keys_differ_by_step_and_repeat_from_the_same_step():
  state, step, _ = setup()
  draws = []
  for _ in range(3):
    saved = jax.device_get(state)
    state, metrics = step(state, make_batch())
    draws.append(float(metrics["draw"]))
  assert len(set(draws)) == 3
  _, metrics = step(saved, make_batch())
  assert float(metrics["draw"]) == draws[-1]


def test_ema_follows_its_formula():
  state, step, _ = setup(OptimizerConfig(0.01, ema_decay=0.5))
  ema = np.array(state["params"]["hidden"]["kernel"])
  for t in range(8):
    state, _ = step(state, make_batch(seed=t))
    d = min(0.5, (1 + t) / (10 + t))
    ema = d * ema + (1 - d) * np.array(state["params"]["hidden"]["kernel"])
  np.testing.assert_allclose(state["ema"]["hidden"]["kernel"], ema, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_stay_and_get_no_gradient():
  state, step, optimizer = setup(OptimizerConfig(0.01, frozen=("^hidden/",)))
  before = jax.device_get(state["params"])
  for _ in range(2):
    state, metrics = step(state, make_batch())
  chex.assert_trees_all_equal(state["params"]["hidden"], before["hidden"])
  assert np.abs(state["params"]["head"]["kernel"] - before["head"]["kernel"]).max() > 0
  head_only = jax.grad(
    lambda h: loss_fn({**state["params"], "head": h}, make_batch(), jax.random.key(0)).loss
  )(state["params"]["head"])
  _, metrics = step(state, make_batch())
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(head_only), rtol=1e-5)


def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path):
  config = OptimizerConfig(0.01, ScheduleSettings(warmup_steps=2), ema_decay=0.9)

  def run(state, step, first, last):
    lines = []
    for t in range(first, last):
      state, metrics = step(state, make_batch(seed=t))
      lines.append({name: float(m) for name, m in metrics.items()})
    return state, lines

  state, step, _ = setup(config, accumulate=4)
  expected, lines = run(state, step, 0, 6)
  state, step, _ = setup(config, accumulate=4)
  state, begun = run(state, step, 0, 3)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, {})
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with Checkpoints(tmp_path) as checkpoints:
    state = checkpoints.restore(target).state
  state, rest = run(state, step, int(state["step"]), 6)
  assert begun + rest == lines
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_preprocess_runs_on_each_microbatch():
  seen = []

  def preprocess(batch):
    seen.append(batch["x"].shape)
    return {**batch, "x": batch["x"] / 2}

  halved, step, _ = setup(preprocess=preprocess, accumulate=3)
  plain, plain_step, _ = setup()
  batch = make_batch()
  _, metrics = step(halved, batch)
  _, expected = plain_step(plain, batch | {"x": batch["x"] / 2})
  np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
  assert seen == [(8, D)]


def test_error_messages():
  with pytest.raises(ValueError, match="accumulate=0"):
    setup(accumulate=0)
  state, step, _ = setup(accumulate=5)
  with pytest.raises(
    ValueError, match="24 rows is not a multiple of 5 .* next size that fits is 25"
  ):
    step(state, make_batch())


def test_frozen_blocks_have_no_gradient():
  def init(key):
    return {"blocks": {"kernel": 0.3 * jax.random.normal(key, (3, D, D))}}

  def loss(params, batch, key, ema=None, step=None):
    x = batch["x"]
    for layer in range(3):
      x = jnp.tanh(x @ params["blocks"]["kernel"][layer])
    return LossOutput(jnp.square(x.sum(axis=1) - batch["y"]).mean(), jnp.float32(1), {})

  params = init(jax.random.key(0))
  config = OptimizerConfig(0.01, grad_clip_norm=0.1, last_blocks=(("^blocks/", 1),))
  optimizer = make_optimizer(config, params, total_steps=10)
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  replicated = NamedSharding(mesh, PartitionSpec())
  state = state_lib.new_state(params, optimizer.tx)
  step = make_train_step(
    loss,
    optimizer.tx,
    state_shardings=jax.tree.map(lambda _: replicated, state),
    batch_sharding=NamedSharding(mesh, PartitionSpec("data")),
    seed=0,
    learning_rate=optimizer.learning_rate,
    trainable=optimizer.trainable,
    project=lambda params: jax.tree.map(lambda x: 2 * x, params),
  )
  before = np.asarray(params["blocks"]["kernel"])
  batch = make_batch()
  expected = jax.grad(lambda p: loss(p, batch, None).loss)(params)["blocks"]["kernel"]
  state, metrics = step(jax.device_put(state, replicated), batch)
  after = np.asarray(state["params"]["blocks"]["kernel"])
  assert after[:2].tobytes() == before[:2].tobytes()
  assert (after[2] != before[2]).all()
  np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(expected[2]), rtol=1e-5)
