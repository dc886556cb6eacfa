"""Learning-rate schedules as multipliers of the peak rate, and step counts of the released code.

A schedule is a function `step -> multiplier`: `step` int or int32 [], result float32 []. It is
traceable; the optimizer multiplies its result by `OptimizerConfig.learning_rate`. Every kind starts
with a linear warm-up from 0:

  warmup(s)        = min(1, s / W)                                         (1 where W = 0)
  warmup_cosine(s) = warmup(s) * (m + (1 - m) * (1 + cos(pi * p)) / 2),  p = clip((s-W)/(T-W), 0, 1)
  wsd(s)           = warmup(s) * (m + (1 - m) * c(q)),  q = clip((s - (T-C)) / C, 0, 1)
  rsqrt(s)         = warmup(s) * sqrt(K / (K + max(0, s - W))) * (m + (1 - m) * c(q))
  constant(s)      = warmup(s)

To add a kind, write its function and add it to `SCHEDULES`.

T total steps, W warmup_steps, m min_multiplier, C cooldown_steps, K timescale: `ScheduleSettings`,
which checks the values. c is the cool-down shape: linear 1 - q, cosine, or sqrt 1 - sqrt(q). Steps
past T keep the last value.

Papers: cosine, Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983; WSD (warm-up, stable,
decay), Hu et al. 2024, https://arxiv.org/abs/2404.06395; 1 - sqrt cool-down, Haegele et al. 2024,
https://arxiv.org/abs/2405.18392; rsqrt, Zhai et al. 2021, https://arxiv.org/abs/2106.04560.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from apps.trainer.run_config import ScheduleSettings

Schedule = Callable[[jax.Array | int], jax.Array]
Decay = Callable[[jax.Array], jax.Array]  # schedule of a float32 step

IMAGENET_EXAMPLES = 1_281_167  # examples of a virtual epoch, for any data set


def make_schedule(config: ScheduleSettings, total_steps: int) -> Schedule:
  """Return the multiplier function of `config` for a run of `total_steps` optimizer steps.

  Raises:
    ValueError: the warm-up does not end before the run, or warm-up and cool-down overlap.
  """
  total, warmup, cooldown = total_steps, config.warmup_steps, config.cooldown_steps
  if total < 1:
    raise ValueError(f"total_steps={total} must be at least 1.")
  if warmup >= total:
    raise ValueError(
      f"warmup_steps={warmup} must be smaller than total_steps={total}; shorten the warm-up or "
      "train longer."
    )
  if warmup + cooldown > total:
    raise ValueError(
      f"warmup_steps={warmup} + cooldown_steps={cooldown} exceed total_steps={total}."
    )
  kind = SCHEDULES[config.kind](config, total)
  return lambda step: kind(jnp.asarray(step, jnp.float32))


def _warmup_cosine(config: ScheduleSettings, total: int) -> Decay:
  _require_no_cooldown(config)
  start = config.warmup_steps

  def schedule(s: jax.Array) -> jax.Array:
    return _warmup(config, s) * _blend(config, _cosine(_fraction(s, start, total - start)))

  return schedule


def _wsd(config: ScheduleSettings, total: int) -> Decay:
  if config.cooldown_steps == 0:
    raise ValueError("schedule kind='wsd' needs cooldown_steps > 0; without decay use 'constant'.")
  return lambda s: _warmup(config, s) * _cooldown(config, total, s)


def _rsqrt(config: ScheduleSettings, total: int) -> Decay:
  def schedule(s: jax.Array) -> jax.Array:
    after = jnp.maximum(0.0, s - config.warmup_steps)
    decay = jnp.sqrt(config.timescale / (config.timescale + after))
    return _warmup(config, s) * decay * _cooldown(config, total, s)

  return schedule


def _constant(config: ScheduleSettings, total: int) -> Decay:
  del total
  _require_no_cooldown(config)
  return lambda s: _warmup(config, s)


def _cosine(p: jax.Array) -> jax.Array:
  return 0.5 * (1.0 + jnp.cos(jnp.pi * p))


SCHEDULES: dict[str, Callable[[ScheduleSettings, int], Decay]] = {
  "warmup_cosine": _warmup_cosine,
  "wsd": _wsd,
  "rsqrt": _rsqrt,
  "constant": _constant,
}
COOLDOWNS: dict[str, Decay] = {
  "linear": lambda q: 1.0 - q,
  "cosine": _cosine,
  "sqrt": lambda q: 1.0 - jnp.sqrt(q),
}


def virtual_epoch_steps(epochs: float, batch_size: int) -> int:
  """Return floor(1,281,167 * epochs / batch_size), the steps of virtual ImageNet epochs.

  Stages and warm-ups of the published recipes are counted in these, independent of the data set.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1.")
  if epochs < 0:
    raise ValueError(f"epochs={epochs} must be >= 0.")
  return math.floor(IMAGENET_EXAMPLES * epochs / batch_size)


def batch_size_from_factor(batch_factor: float) -> int:
  """Return the global batch size for a `batch_factor` of the released code: int(16384 * factor)."""
  return int(1024 * 16 * batch_factor)


def scaled_learning_rate(base_lr: float, batch_size: int) -> float:
  """Return the peak learning rate for a `base_lr` per 256 examples: base_lr * batch_size / 256."""
  return base_lr * batch_size / 256


def _require_no_cooldown(config: ScheduleSettings) -> None:
  if config.cooldown_steps:
    raise ValueError(
      f"schedule kind={config.kind!r} has no cool-down, got "
      f"cooldown_steps={config.cooldown_steps}; set it to 0 or choose 'wsd' or 'rsqrt'."
    )


def _warmup(config: ScheduleSettings, step: jax.Array) -> jax.Array:
  return (
    jnp.minimum(1.0, step / config.warmup_steps) if config.warmup_steps else jnp.ones_like(step)
  )


def _fraction(step: jax.Array, start: int, length: int) -> jax.Array:
  return jnp.clip((step - start) / max(length, 1), 0.0, 1.0)


def _blend(config: ScheduleSettings, decay: jax.Array) -> jax.Array:
  return config.min_multiplier + (1.0 - config.min_multiplier) * decay


def _cooldown(config: ScheduleSettings, total: int, step: jax.Array) -> jax.Array:
  length = config.cooldown_steps
  if not length:
    return jnp.ones_like(step)
  return _blend(config, COOLDOWNS[config.cooldown_shape](_fraction(step, total - length, length)))
