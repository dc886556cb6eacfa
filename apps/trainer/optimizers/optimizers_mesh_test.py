"""Tests of every optimizer on one and eight devices, with state sharded over fsdp and tensor."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from apps.trainer import state as state_lib
from apps.trainer.losses.loss_term import LossOutput
from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.optimizers import OPTIMIZERS, Adafactor
from apps.trainer.paths import flatten_paths
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.step import make_train_step

L, B, D, F = 2, 16, 16, 32
RATE, STEPS = 1e-3, 3
SHAPES = {
  "blocks": {
    "attn": {"kernel": (L, D, D)},
    "up": {"kernel": (L, D, F), "bias": (L, F)},
    "down": {"kernel": (L, F, D)},
  },
  "head": {"kernel": (D, D)},
}
SPECS = {
  "blocks": {
    "attn": {"kernel": P(None, "fsdp", "tensor")},
    "up": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
    "down": {"kernel": P(None, "tensor", "fsdp")},
  },
  "head": {"kernel": P("fsdp", None)},
}
RULES = {name: kind() for name, kind in OPTIMIZERS.items()}
RULES["adafactor"] = Adafactor(min_dim_size_to_factor=8, momentum=0.9)


def init_params(key):
  leaves, tree = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
  keys = jax.random.split(key, len(leaves))
  return tree.unflatten(jax.random.normal(k, s) / D**0.5 for k, s in zip(keys, leaves, strict=True))


def loss_fn(params, batch, key, ema=None, step=None):
  del key
  x, blocks = batch["x"], params["blocks"]
  for i in range(L):
    hidden = x @ blocks["attn"]["kernel"][i] @ blocks["up"]["kernel"][i]
    x = x + jax.nn.gelu(hidden + blocks["up"]["bias"][i]) @ blocks["down"]["kernel"][i]
  loss = jnp.mean((x @ params["head"]["kernel"] - batch["y"]) ** 2)
  return LossOutput(loss, jnp.float32(len(x)), {})


def make_batch(step):
  x = np.random.default_rng(step).normal(size=(B, D)).astype(np.float32)
  return {"x": x, "y": np.tanh(x[:, ::-1] + x)}


@functools.cache
def setup(name, shape):
  mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "tensor"))
  of_params = jax.tree.map(
    lambda s: NamedSharding(mesh, s), SPECS, is_leaf=lambda s: isinstance(s, P)
  )
  abstract_params = jax.eval_shape(init_params, jax.random.key(0))
  config = OptimizerConfig(RATE, ScheduleSettings(kind="constant"), RULES[name], grad_clip_norm=1.0)
  optimizer = make_optimizer(config, abstract_params, total_steps=10)
  abstract = state_lib.abstract_state(abstract_params, optimizer.tx)
  shardings = state_lib.state_shardings(abstract, of_params, mesh)
  batch_sharding = NamedSharding(mesh, P(("data", "fsdp")))
  step = make_train_step(
    loss_fn,
    optimizer.tx,
    state_shardings=shardings,
    batch_sharding=batch_sharding,
    seed=0,
    learning_rate=optimizer.learning_rate,
  )
  return optimizer.tx, step, abstract, shardings, batch_sharding


def train(name, shape):
  tx, step, _, shardings, batch_sharding = setup(name, shape)
  state = state_lib.init_state(init_params, jax.random.key(0), tx, shardings)
  losses = []
  for i in range(STEPS):
    state, metrics = step(state, jax.device_put(make_batch(i), batch_sharding))
    losses.append(float(metrics["loss"]))
  assert step._cache_size() == 1  # traced once
  return jax.device_get(state["params"]), losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_match_one(name):
  expected, expected_losses = train(name, (1, 1, 1))
  params, losses = train(name, (2, 4, 1))
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)  # different summation order
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    off = np.abs(x - y) / RATE  # in updates
    # Where a gradient is near zero, its sign depends on the order of sums; a moment may round to
    # the next bfloat16.
    assert np.quantile(off, 0.99) < 5e-3 and off.max() < 2.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tensor_parallel_updates_match_one_device(name):
  """Tests the update only: the loss constrains no activations, as tensor parallelism requires."""

  def run(shape):
    tx, _, _, shardings, _ = setup(name, shape)
    kinds = shardings["params"], shardings["opt"], shardings["params"]
    update = jax.jit(tx.update, in_shardings=kinds, out_shardings=kinds[:2])
    params = jax.device_put(init_params(jax.random.key(0)), kinds[0])
    opt = jax.jit(tx.init, out_shardings=kinds[1])(params)
    for i in range(STEPS):
      grads = jax.device_put(init_params(jax.random.key(1 + i)), kinds[0])
      updates, opt = update(grads, opt, params)
    return jax.device_get(updates)

  for x, y in zip(*map(jax.tree.leaves, (run((2, 2, 2)), run((1, 1, 1)))), strict=True):
    np.testing.assert_allclose(x / RATE, y / RATE, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_sharded_like_the_params(name, caplog):
  _, _, abstract, shardings, _ = setup.__wrapped__(name, (2, 2, 2))
  assert not caplog.records  # no large array is replicated
  specs = {path: s.spec for path, s in flatten_paths(shardings["opt"]).items()}
  of_params = {path: s.spec for path, s in flatten_paths(shardings["params"]).items()}
  followed = set()
  for path, leaf in flatten_paths(abstract["opt"]).items():
    param = next((p for p in of_params if path.endswith(f"/{p}")), None)
    if param is None or leaf.size == 1:
      assert leaf.size == 1, path
      continue
    whole = [*of_params[param], *[None] * (leaf.ndim - len(of_params[param]))]
    expected = [axis if n > 1 else None for n, axis in zip(leaf.shape, whole, strict=True)]
    assert [*specs[path], *[None] * (leaf.ndim - len(specs[path]))] == expected, path
    followed.add(param)
  assert followed == of_params.keys()
