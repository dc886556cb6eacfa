"""Tests of the temperature limit in the train step, on one and eight devices."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from apps.trainer import state as state_lib
from apps.trainer.losses import Clip
from apps.trainer.losses.loss_term import LossOutput
from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.step import make_train_step
from apps.trainer.task import Task
from ov_data import TextSpec
import ov_losses
import ov_models
import ov_sharding

ROWS, EMBED, STEPS = 32, 8, 300
TOWERS = ov_models.VisionLanguageConfig.from_names("mu/16", "Ti", None, image_size=16)


def task(max_scale, mesh):
  spec = TextSpec(("txt",), 8)
  return Task(TOWERS, (Clip(max_scale=max_scale),), 0, mesh, specs=(("alt_ids", spec),))


def loss(params, batch, key, ema=None, step=None):
  out = ov_losses.contrastive_softmax(
    batch["image"], batch["text"], jnp.exp(params["log_scale"]), form="naive"
  )
  return LossOutput(out.loss, jnp.float32(len(batch["image"])), {"scale": params["log_scale"]})


def pairs():
  """Return pairs so noisy that the optimal scale is far below 100."""
  rng = np.random.default_rng(0)
  unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
  image = unit(rng.normal(size=(ROWS, EMBED)))
  return {"image": image, "text": unit(image + 0.9 * rng.normal(size=image.shape))}


def train(start, max_scale, devices=1, accumulate=1, frozen=(), steps=STEPS):
  """Train from a state with scale `start`; return the last params and their average."""
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:devices])
  whole = NamedSharding(mesh, PartitionSpec())
  schedule = ScheduleSettings(warmup_steps=0)
  config = OptimizerConfig(0.05, schedule, weight_decay=0.0, ema_decay=0.9, frozen=frozen)
  params = {"log_scale": jnp.float32(math.log(start)), "other": jnp.float32(200.0)}
  optimizer = make_optimizer(config, params, total_steps=10 * STEPS)
  abstract = state_lib.abstract_state(params, optimizer.tx, ema=True)
  shardings = jax.tree.map(lambda _: whole, abstract)
  state = state_lib.init_state(lambda _: params, jax.random.key(0), optimizer.tx, shardings)
  clip = task(max_scale, mesh)
  rows = ov_sharding.batch_sharding(mesh)
  step = make_train_step(
    loss, optimizer.tx, state_shardings=shardings, batch_sharding=rows, seed=0,
    learning_rate=optimizer.learning_rate, accumulate=accumulate, ema_decay=config.ema_decay,
    trainable=optimizer.trainable, project=clip.project,
  )  # fmt: skip
  batch = jax.device_put(pairs(), rows)
  for _ in range(steps):
    state, metrics = step(state, batch)
    assert metrics["nonfinite"] == 0
  assert state["params"]["other"] == 200.0  # only the temperature is limited
  return math.exp(state["params"]["log_scale"]), math.exp(state["ema"]["log_scale"])


@pytest.mark.parametrize("start", [90.0, 200.0])
def test_scale_above_limit_converges(start):
  scales = np.linspace(1.0, 100.0, 991)
  values = jax.vmap(lambda x: loss({"log_scale": jnp.log(x)}, pairs(), None).loss)(scales)
  best = scales[np.argmin(values)]
  assert 3 < best < 20
  # The average of decay 0.9 is 10 steps behind.
  np.testing.assert_allclose(train(start, 100.0), best, rtol=0.05)


@pytest.mark.parametrize(("start", "expected"), [(200.0, 100.0), (0.2, 1.0)])
def test_one_step_clips_scale(start, expected):
  assert train(start, 100.0, steps=1)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("devices", "accumulate"), [(8, 1), (8, 2), (1, 4)])
def test_limit_with_devices_and_accumulation(devices, accumulate):
  last, average = train(200.0, 100.0, devices, accumulate, steps=1)
  assert last == pytest.approx(100.0, rel=1e-5)
  assert 100.0 < average < 200.0  # average of the restored and the clipped value


def test_frozen_or_unlimited_scale_is_not_clipped():
  assert train(200.0, 100.0, frozen=("log_scale",), steps=2)[0] == pytest.approx(200.0, rel=1e-6)
  assert 150 < train(200.0, None, steps=2)[0] < 200


def test_model_without_temperature():
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:1])
  assert task(100.0, mesh).project({"encoder": 1.0}) == {"encoder": 1.0}
