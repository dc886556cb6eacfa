"""Tests of schedules against values of the released code, closed forms and limits."""

import jax
import numpy as np
import pytest

from apps.trainer import schedules
from apps.trainer.run_config import ScheduleSettings

# 10 steps, 2 of them warm-up: multipliers of the optimizer of the released code (float32).
PREDECESSOR_0_TO_10 = (
  0.0, 0.5, 1.0, 0.96193975, 0.85355341, 0.6913417, 0.49999997, 0.30865824, 0.14644662,
  0.03806019, 0.0,
)  # fmt: skip


def values(config: ScheduleSettings, total: int, steps) -> np.ndarray:
  schedule = jax.jit(schedules.make_schedule(config, total))
  return np.array([schedule(step) for step in steps])


def test_warmup_cosine_matches_released_code():
  ours = values(ScheduleSettings(warmup_steps=2), 10, range(11))
  # One float32 ulp of cos at its steepest is 6e-8.
  np.testing.assert_allclose(ours, PREDECESSOR_0_TO_10, rtol=0, atol=2e-7)


def test_floor_is_blended_into_the_decay_not_into_the_warmup():
  plain = values(ScheduleSettings(warmup_steps=4), 20, range(21))
  floored = values(ScheduleSettings(warmup_steps=4, min_multiplier=0.1), 20, range(21))
  np.testing.assert_allclose(floored[:5], plain[:5], atol=1e-7)
  np.testing.assert_allclose(floored[4:], 0.1 + 0.9 * plain[4:], atol=1e-6)


@pytest.mark.parametrize("kind", ["warmup_cosine", "constant"])
def test_no_warmup_starts_at_the_peak(kind):
  assert values(ScheduleSettings(kind=kind), 10, [0])[0] == 1.0


def test_wsd_is_flat_then_decays_to_the_floor():
  config = ScheduleSettings(kind="wsd", warmup_steps=5, cooldown_steps=10, min_multiplier=0.2)
  ours = values(config, 40, range(41))
  np.testing.assert_allclose(ours[:6], np.arange(6) / 5, atol=1e-6)
  np.testing.assert_array_equal(ours[5:31], 1.0)
  np.testing.assert_allclose(ours[30:], np.linspace(1.0, 0.2, 11), atol=1e-6)


@pytest.mark.parametrize(
  "shape,middle", [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - np.sqrt(0.5))]
)
def test_cooldown_shapes(shape, middle):
  config = ScheduleSettings(kind="wsd", cooldown_steps=10, cooldown_shape=shape)
  np.testing.assert_allclose(values(config, 20, [10, 15, 20]), [1, middle, 0], atol=1e-6)


def test_rsqrt_halves_after_three_timescales():
  config = ScheduleSettings(kind="rsqrt", warmup_steps=10, timescale=100)
  np.testing.assert_allclose(values(config, 1000, [5, 10, 310]), [0.5, 1.0, 0.5], atol=1e-6)
  cooled = ScheduleSettings(kind="rsqrt", warmup_steps=10, timescale=100, cooldown_steps=100)
  assert values(cooled, 1000, [1000])[0] == 0.0


@pytest.mark.parametrize("kind", ["warmup_cosine", "wsd", "rsqrt", "constant"])
def test_steps_past_the_end_keep_the_last_value(kind):
  cooldown = 3 if kind == "wsd" else 0
  config = ScheduleSettings(kind=kind, warmup_steps=2, cooldown_steps=cooldown, min_multiplier=0.1)
  end, past = values(config, 10, [10, 11])
  if kind != "rsqrt":  # rsqrt keeps decaying
    assert end == past
  assert past > 0


@pytest.mark.parametrize(
  "kwargs,total,message",
  [
    (dict(warmup_steps=10), 10, "warmup_steps=10 must be smaller than total_steps=10"),
    (dict(kind="wsd", warmup_steps=5, cooldown_steps=6), 10, "exceed total_steps=10"),
    (dict(), 0, "total_steps=0"),
    (dict(kind="wsd"), 10, "needs cooldown_steps"),
    (dict(kind="constant", cooldown_steps=3), 10, "no cool-down"),
  ],
)
def test_invalid_schedules(kwargs, total, message):
  with pytest.raises(ValueError, match=message):
    schedules.make_schedule(ScheduleSettings(**kwargs), total)


@pytest.mark.parametrize(
  "epochs,warmup,factor,base_lr,steps,warmup_steps,lr",
  [
    (10_000, 40, 2.0, 8e-6, 390_981, 1_563, 1.024e-3),
    (800, 20, 1.0, 4e-7, 62_556, 1_563, 2.56e-5),
    (200, 0, 0.5, 1e-7, 31_278, 0, 3.2e-6),
  ],
)
def test_recipe_arithmetic(epochs, warmup, factor, base_lr, steps, warmup_steps, lr):
  batch = schedules.batch_size_from_factor(factor)
  assert schedules.virtual_epoch_steps(epochs, batch) == steps
  assert schedules.virtual_epoch_steps(warmup, batch) == warmup_steps
  np.testing.assert_allclose(schedules.scaled_learning_rate(base_lr, batch), lr, rtol=1e-12)
