"""Tests of loss terms in a task: sums, accumulation, masks, and a custom loss."""

import dataclasses
import functools
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.configs import base
from apps.trainer import losses
from apps.trainer.config import make_task
from apps.trainer.losses.loss_term import LossOutput, LossTerm
from apps.trainer.parts import build_parts, build_step
from apps.trainer.state import init_state
import ov_data
import ov_models
import ov_sharding

ROWS = 16
TOKENIZER = ov_data.Tokenizer.train(["a red square", "a blue dot"], 40)
BLOCK = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift(LossTerm):
  """Squared distance of image embeddings to those of the averaged params, over valid rows."""

  floor: float = 0.0

  def __call__(self, context):
    assert context.ema is not None, "Drift needs config.optimizer.ema_decay"
    teacher = ov_models.bind(context.model.config, context.ema)
    target = teacher.encode_image(context.batch["image"]).unit
    distance = ((context.outputs.image.unit - target) ** 2).sum(-1) + self.floor
    valid = context.batch["valid"]
    count = valid.sum().astype(jnp.float32)
    loss = (distance * valid).sum() / jnp.maximum(count, 1)
    return LossOutput(loss, count, {"drift": loss, "seen": context.step.astype(jnp.float32)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(LossTerm):
  """Mean similarity of different images; compares rows without texts."""

  compares_rows: ClassVar[bool] = True

  def rows(self, context):
    return {"unit": context.outputs.image.unit}

  def compare(self, params, rows, mesh):
    both = rows["valid"][:, None] & rows["valid"][None]
    similar = jnp.where(both, rows["unit"] @ rows["unit"].T, 0).sum()
    count = rows["valid"].sum().astype(jnp.float32)
    loss = similar / jnp.maximum(count**2, 1)
    return LossOutput(loss, count, {"spread": loss})


class Sentences(LossTerm):
  """A loss that requires a text which captioners do not have."""

  batch_keys: ClassVar[tuple[str, ...]] = ("sentence_ids",)


@pytest.fixture(autouse=True)
def table(monkeypatch):
  """Add three losses to the table."""
  more = {"drift": Drift, "spread": Spread, "sentences": Sentences}
  for name, kind in more.items():
    monkeypatch.setitem(losses.LOSSES, name, kind)


def make_config(kind="clip", **settings):
  config = base.caption_config() if kind == "caption" else base.clip_config()
  config.model.update(encoder="mu/16", image_size=32, vocab_size=0, token_len=9, caption_len=8)
  config.model.encoder_options, config.model.decoder_options = BLOCK, BLOCK
  if kind == "clip":
    config.model.text_options = BLOCK
  config.batch_size, config.optimizer.learning_rate = ROWS, 1e-3
  return base.resolve(config).with_settings(settings)


def make_batch(task, seed=0):
  """Return random images and texts of different lengths; every fourth row is invalid."""
  draw = np.random.default_rng(seed)
  batch = {
    "image": draw.integers(0, 256, (ROWS, 32, 32, 3), np.uint8),
    "valid": np.arange(ROWS) % 4 != 1,
    "index": np.arange(ROWS, dtype=np.int32),
  }
  for name in task.text_specs or {"ids": None}:
    length = task.text_specs[name].length if task.text_specs else task.text_len
    ids = draw.integers(5, TOKENIZER.vocab_size, (ROWS, length), np.int32)
    end = draw.integers(2, length + 1, ROWS)
    batch[name] = np.where(np.arange(length) < end[:, None], ids, task.pad_id).astype(np.int32)
  return batch


def train(config, devices=1, steps=2):
  """Return the params after some steps, and the metrics of each step."""
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:devices])
  parts = build_parts(config, TOKENIZER, mesh)
  state = init_state(parts.task.init, jax.random.key(0), parts.optimizer.tx, parts.shardings)
  step = build_step(config, parts, mesh, 0)
  lines = []
  for number in range(steps):
    batch = jax.device_put(make_batch(parts.task, number), ov_sharding.batch_sharding(mesh))
    state, metrics = step(state, batch)
    lines.append({name: float(value) for name, value in metrics.items()})
  assert step._cache_size() == 1
  return jax.device_get(state["params"]), lines


MIXES = {
  "rows that are compared": {
    "loss.siglip": 0.5,
    "model.bias_init": -1.0,
    "loss.mask_duplicates": True,
    "loss.more": {"spread": {"weight": 2.0}},
  },
  "means over different units": {
    "loss.more": {"drift": {"weight": 0.5, "floor": 0.1}},
    "model.keep_ratio": 1.0,
    "optimizer.ema_decay": 0.9,
  },
}


@functools.cache
def trained(mix, devices=1, accumulate=1):
  kind = "caption" if mix == "means over different units" else "clip"
  # Adam with eps=1 is nearly linear: gradients that should be 0 stay as small as their rounding.
  settings = MIXES[mix] | {"accumulate": accumulate, "optimizer.eps": 1.0}
  settings["input.color_jitter"] = False
  return train(make_config(kind, **settings), devices)


@pytest.mark.parametrize("mix", MIXES)
def test_devices_and_accumulation_do_not_change_training(mix):
  expected, got = trained(mix), trained(mix, devices=8, accumulate=2)
  # different float32 summation order.
  chex.assert_trees_all_close(got[0], expected[0], rtol=1e-4, atol=1e-6)
  for a, b in zip(got[1], expected[1], strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_loss_is_weighted_sum_of_terms():
  line = trained("rows that are compared")[1][0]
  expected = line["clip_loss"] + 0.5 * line["siglip_loss"] + 2 * line["caption_nll"]
  np.testing.assert_allclose(line["loss"], expected + 2 * line["spread"], rtol=1e-6)
  lines = trained("means over different units")[1]
  for number, line in enumerate(lines):
    np.testing.assert_allclose(line["loss"], line["caption_nll"] + 0.5 * line["drift"], rtol=1e-6)
    assert line["seen"] == number
  assert lines[0]["drift"] == pytest.approx(0.1)
  assert lines[1]["drift"] > lines[0]["drift"]  # the average lags behind


def test_invalid_rows_have_no_gradient():
  task = build_parts(make_config(), TOKENIZER, ov_sharding.make_mesh(ov_sharding.MeshConfig())).task
  batch = make_batch(task)
  other = {name: array.copy() for name, array in batch.items()}
  broken = ~batch["valid"]
  other["image"][broken] = 0
  for name in task.text_specs:
    other[name][broken, 1] = 5
  params = jax.jit(task.init)(jax.random.key(0))
  as_floats = lambda b: b | {"image": b["image"].astype(np.float32)}
  grad = jax.jit(jax.grad(lambda p, b: task.loss(p, b, jax.random.key(1)).loss))
  chex.assert_trees_all_equal(grad(params, as_floats(batch)), grad(params, as_floats(other)))


@pytest.mark.parametrize(
  ("kind", "settings", "message"),
  [
    ("clip", {"loss.clip": 0.0, "loss.caption": 0.0}, "every weight is 0; set clip, siglip, cap"),
    ("clip", {"model.text": ""}, "a contrastive loss needs a text tower"),
    ("clip", {"input.alt_keys": ()}, r"config.input.alt_keys=\(\), and the text tower needs short"),
    ("clip", {"input.caption_keys": ()}, r"config.input.caption_keys=\(\), and the decoder or"),
    (
      "caption",
      {"loss.more": {"sentences": {"weight": 1.0}}},
      "Sentences needs sentence_ids and a batch has only caption_ids",
    ),
    ("clip", {"model.decoder": ""}, "config.loss.caption needs a decoder"),
    ("clip", {"loss.caption": 0.0}, 'config.loss.caption is 0; set config.model.decoder=""'),
    ("caption", {"loss.clip": 1.0}, "a contrastive loss needs a text tower"),
    (
      "caption",
      {"loss.more": {"distil": {"weight": 1.0}}},
      "loss.more has 'distil'; valid names are",
    ),
    ("caption", {"loss.more": {"clip": {"weight": 1.0}}}, "has 'clip'; set config.loss.clip"),
    ("caption", {"loss.more": {"drift": {"flor": 1.0}}}, "drift has 'flor'; did you mean 'floor'"),
    ("caption", {"loss.more": {"drift": {"floor": 1.0}}}, "loss.more.drift has no weight"),
    ("caption", {"loss.more": {"drift": {"weight": "a"}}}, "drift.weight='a'; expected a finite"),
  ],
)
def test_invalid_losses(kind, settings, message):
  with pytest.raises(ValueError, match=message):
    make_task(make_config(kind, **settings), TOKENIZER, None)
