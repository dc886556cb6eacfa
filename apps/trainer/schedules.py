"""Learning-rate schedules as multipliers of the peak rate, and the predecessors' step arithmetic.

A schedule is a function `step -> multiplier`: `step` int or int32 [], result float32 []. It is
traceable, and the optimizer multiplies it with `OptimizerConfig.learning_rate`. Every kind starts
with a linear warm-up from 0:

  warmup(s)        = min(1, s / W)                                         (1 where W = 0)
  warmup_cosine(s) = warmup(s) * (m + (1 - m) * (1 + cos(pi * p)) / 2),  p = clip((s-W)/(T-W), 0, 1)
  wsd(s)           = warmup(s) * (m + (1 - m) * c(q)),  q = clip((s - (T-C)) / C, 0, 1)
  rsqrt(s)         = warmup(s) * sqrt(K / (K + max(0, s - W))) * (m + (1 - m) * c(q))
  constant(s)      = warmup(s)

`SCHEDULES` has one function for each kind; to add one, write its function and its line there.

T total steps, W warmup_steps, m min_multiplier, C cooldown_steps, K timescale, and c the cool-down
shape: linear 1 - q, cosine, or sqrt 1 - sqrt(q). Steps past T keep the last value.

Papers: cosine, Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983; WSD (warm-up, stable,
decay), Hu et al. 2024, https://arxiv.org/abs/2404.06395; 1 - sqrt cool-down, Haegele et al. 2024,
https://arxiv.org/abs/2405.18392; rsqrt, Zhai et al. 2021, https://arxiv.org/abs/2106.04560.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]
Decay = Callable[[jax.Array], jax.Array]  # the same of a float32 step

IMAGENET_EXAMPLES = 1_281_167  # the unit of a virtual epoch, whatever the data set really holds


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Which schedule, and its lengths in optimizer steps.

  Attributes:
    kind: key of `SCHEDULES`, see the formulas above.
    warmup_steps: W, linear warm-up from 0; fewer than the total steps.
    min_multiplier: m in [0, 1), what a decay ends at, as a share of the peak rate.
    cooldown_steps: C, the last steps over which wsd and rsqrt decay to m; W + C <= T.
    cooldown_shape: key of `COOLDOWNS`, c of the formulas.
    timescale: K of rsqrt, in steps.
  """

  kind: str = "warmup_cosine"
  warmup_steps: int = 0
  min_multiplier: float = 0.0
  cooldown_steps: int = 0
  cooldown_shape: str = "linear"
  timescale: int = 10_000

  def __post_init__(self) -> None:
    for name, table in (("kind", SCHEDULES), ("cooldown_shape", COOLDOWNS)):
      if (value := getattr(self, name)) not in table:
        raise ValueError(f"schedule {name}={value!r} is unknown; choose one of {', '.join(table)}.")
    if self.warmup_steps < 0 or self.cooldown_steps < 0:
      raise ValueError(
        f"schedule lengths must be >= 0, got warmup_steps={self.warmup_steps}, "
        f"cooldown_steps={self.cooldown_steps}."
      )
    if not 0 <= self.min_multiplier < 1:
      raise ValueError(
        f"schedule min_multiplier={self.min_multiplier} must lie in [0, 1): it is a share of the "
        "peak learning rate, not a rate."
      )
    if self.timescale <= 0:
      raise ValueError(f"schedule timescale={self.timescale} must be a positive number of steps.")


def make_schedule(config: ScheduleConfig, total_steps: int) -> Schedule:
  """The multiplier function of `config` for a run of `total_steps` optimizer steps.

  Raises:
    ValueError: if the warm-up does not end before the run does, or warm-up and cool-down overlap.
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


def _warmup_cosine(config: ScheduleConfig, total: int) -> Decay:
  _require_no_cooldown(config)
  start = config.warmup_steps

  def schedule(s: jax.Array) -> jax.Array:
    return _warmup(config, s) * _blend(config, _cosine(_fraction(s, start, total - start)))

  return schedule


def _wsd(config: ScheduleConfig, total: int) -> Decay:
  if config.cooldown_steps == 0:
    raise ValueError("schedule kind='wsd' needs cooldown_steps > 0; without decay use 'constant'.")
  return lambda s: _warmup(config, s) * _cooldown(config, total, s)


def _rsqrt(config: ScheduleConfig, total: int) -> Decay:
  def schedule(s: jax.Array) -> jax.Array:
    after = jnp.maximum(0.0, s - config.warmup_steps)
    decay = jnp.sqrt(config.timescale / (config.timescale + after))
    return _warmup(config, s) * decay * _cooldown(config, total, s)

  return schedule


def _constant(config: ScheduleConfig, total: int) -> Decay:
  del total
  _require_no_cooldown(config)
  return lambda s: _warmup(config, s)


def _cosine(p: jax.Array) -> jax.Array:
  return 0.5 * (1.0 + jnp.cos(jnp.pi * p))


SCHEDULES: dict[str, Callable[[ScheduleConfig, int], Decay]] = {
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
  """Optimizer steps of `epochs` virtual ImageNet epochs: floor(1,281,167 * epochs / batch_size).

  Stages and warm-ups of the published recipes are counted in these, independent of the data set.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1.")
  if epochs < 0:
    raise ValueError(f"epochs={epochs} must be >= 0.")
  return math.floor(IMAGENET_EXAMPLES * epochs / batch_size)


def batch_size_from_factor(batch_factor: float) -> int:
  """Global batch of the predecessors' `batch_factor`: int(16384 * batch_factor) examples."""
  return int(1024 * 16 * batch_factor)


def scaled_learning_rate(base_lr: float, batch_size: int) -> float:
  """Peak learning rate of a `base_lr` given per 256 examples: base_lr * batch_size / 256."""
  return base_lr * batch_size / 256


def _require_no_cooldown(config: ScheduleConfig) -> None:
  if config.cooldown_steps:
    raise ValueError(
      f"schedule kind={config.kind!r} has no cool-down, got "
      f"cooldown_steps={config.cooldown_steps}; set it to 0 or choose 'wsd' or 'rsqrt'."
    )


def _warmup(config: ScheduleConfig, step: jax.Array) -> jax.Array:
  return (
    jnp.minimum(1.0, step / config.warmup_steps) if config.warmup_steps else jnp.ones_like(step)
  )


def _fraction(step: jax.Array, start: int, length: int) -> jax.Array:
  return jnp.clip((step - start) / max(length, 1), 0.0, 1.0)


def _blend(config: ScheduleConfig, decay: jax.Array) -> jax.Array:
  return config.min_multiplier + (1.0 - config.min_multiplier) * decay


def _cooldown(config: ScheduleConfig, total: int, step: jax.Array) -> jax.Array:
  length = config.cooldown_steps
  if not length:
    return jnp.ones_like(step)
  return _blend(config, COOLDOWNS[config.cooldown_shape](_fraction(step, total - length, length)))
