"""Tests that updates of a loss between rows do not depend on micro-batches and devices."""

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
from apps.trainer.optimizers import AdamW
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.step import make_train_step

B, D, E = 32, 12, 8
CONFIG = OptimizerConfig(1e-2, ScheduleSettings(kind="constant"), AdamW(mu_dtype="float32"))


class Toy:
  """CLIP loss between two linear towers, and a masked mean square error per row."""

  def init(self, key):
    a, b, c = jax.random.split(key, 3)
    return {
      "image": {"kernel": jax.random.normal(a, (D, E)) / D**0.5},
      "text": {"kernel": jax.random.normal(b, (D, E)) / D**0.5},
      "head": {"kernel": jax.random.normal(c, (E, 1)) / E**0.5},
      "log_scale": jnp.float32(1.5),
    }

  def embed(self, params, batch, key, ema=None, step=None):
    del key
    unit = lambda x: x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-8)
    image = jnp.tanh(batch["x"] @ params["image"]["kernel"])
    rows = {
      "image": unit(image),
      "text": unit(jnp.tanh(batch["y"] @ params["text"]["kernel"])),
      "valid": batch["valid"],
    }
    error = (image @ params["head"]["kernel"])[:, 0] - batch["z"]
    weight = batch["mask"].sum()
    own = (error**2 * batch["mask"]).sum() / jnp.maximum(weight, 1)
    return rows, [LossOutput(own, weight, {"own": own})]

  def combine(self, params, rows):
    valid = rows["valid"]
    logits = jnp.exp(params["log_scale"]) * rows["image"] @ rows["text"].T
    logits = jnp.where(valid[:, None] & valid[None], logits, -1e9)
    count = valid.sum().astype(jnp.float32)
    both = sum(-jnp.diagonal(jax.nn.log_softmax(logits, axis)) for axis in (0, 1)) / 2
    loss = jnp.where(valid, both, 0).sum() / jnp.maximum(count, 1)
    return LossOutput(loss, count, {"between": loss})

  def loss(self, params, batch, key, ema=None, step=None):
    rows, (own,) = self.embed(params, batch, key)
    out = self.combine(params, rows)
    return LossOutput(out.loss + own.loss, out.weight, out.metrics | own.metrics)


def make_batch(step):
  rng = np.random.default_rng(step)
  pair = rng.normal(size=(B, D)).astype(np.float32)
  valid = rng.uniform(size=B) < 0.8
  return {
    "x": 2 * pair,  # halved by `preprocess`
    "y": pair + 0.3 * rng.normal(size=(B, D)).astype(np.float32),
    "z": pair.sum(axis=1) / 4,
    "mask": (valid & (rng.uniform(size=B) < 0.5)).astype(np.float32),
    "valid": valid,
  }


@functools.cache
def train(shape=(1, 1), accumulate=1, frozen=(), two_phase=True, steps=3):
  task = Toy()
  mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "fsdp"))
  abstract_params = jax.eval_shape(task.init, jax.random.key(0))
  matrix, scalar = NamedSharding(mesh, P("fsdp", None)), NamedSharding(mesh, P())
  of_params = jax.tree.map(lambda p: matrix if p.ndim else scalar, abstract_params)
  config = OptimizerConfig(1e-2, CONFIG.schedule, CONFIG.rule, frozen=frozen)
  optimizer = make_optimizer(config, abstract_params, total_steps=10)
  abstract = state_lib.abstract_state(abstract_params, optimizer.tx, ema=False)
  shardings = state_lib.state_shardings(abstract, of_params, mesh)
  state = state_lib.init_state(task.init, jax.random.key(0), optimizer.tx, shardings)
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  step = make_train_step(
    task.loss,
    optimizer.tx,
    state_shardings=shardings,
    batch_sharding=rows,
    seed=0,
    learning_rate=optimizer.learning_rate,
    accumulate=accumulate,
    preprocess=lambda batch: {**batch, "x": batch["x"] / 2},
    trainable=optimizer.trainable,
    two_phase=task if two_phase else None,
  )
  lines = []
  for i in range(steps):
    state, metrics = step(state, jax.device_put(make_batch(i), rows))
    lines.append({name: float(value) for name, value in metrics.items()})
  return jax.device_get(state["params"]), lines


def assert_same(got, expected):
  for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
    # different float32 summation order; three Adam steps of 1e-2 amplify that.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  for a, b in zip(got[1], expected[1], strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  ("shape", "accumulate"), [((1, 1), 4), ((8, 1), 1), ((8, 1), 4), ((2, 4), 4)]
)
def test_updates_do_not_depend_on_micro_batches_and_devices(shape, accumulate):
  assert_same(train(shape, accumulate), train())


def test_loss_without_two_phases_differs():
  """Ensures that the tests above are meaningful: the rows of the toy depend on each other."""
  _, lines = train(accumulate=4, two_phase=False)
  assert abs(lines[0]["between"] - train()[1][0]["between"]) > 0.5


def test_frozen_params_stay_and_the_others_learn_the_same():
  frozen = ("^text/", "^log_scale$")
  got, expected = train(accumulate=4, frozen=frozen), train(frozen=frozen)
  assert_same(got, expected)
  initial = jax.jit(Toy().init)(jax.random.key(0))
  np.testing.assert_array_equal(got[0]["text"]["kernel"], initial["text"]["kernel"])
  assert np.abs(got[0]["image"]["kernel"] - initial["image"]["kernel"]).max() > 1e-3
