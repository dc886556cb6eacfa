"""Optimizer of a stage: an update rule in a chain that all rules share.

  make_optimizer(config, abstract_params, total_steps) -> Optimizer(tx, learning_rate, groups)

The chain, in this order. The names are the keys of its state in checkpoints; only "NAME" and
"schedule" have a state:

  clip           clip_by_global_norm(grad_clip_norm), or identity
  NAME           the update rule by its name in `optimizers.OPTIMIZERS`, such as "adamw", without
                 state for frozen parameters
  weight_decay   add_decayed_weights(weight_decay), only where the path matches `decay_regex`
  rate           scale(learning_rate)
  multipliers    lr_multipliers times layer-wise decay
  schedule       scale_by_schedule(multiplier); its count is the optimizer step
  frozen         set_to_zero for frozen parameters
  sign           scale(-1)

so that  delta w = -lr * schedule(step) * multiplier(w) * (rule(g) + weight_decay * w).

Weight decay is decoupled (AdamW, Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101).
Layer-wise decay follows BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254): block i of L gets
r^(L-i), embeddings before the blocks get r^(L+1), everything else 1.

Paths are the keys of the nested dict joined by "/", e.g. `encoder/blocks/attn/query/kernel`.
Regexes are matched with `re.search`; anchor them with ^ and $ where needed.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apps.trainer.optimizers import OPTIMIZERS, AdamW, UpdateRule
from apps.trainer.optimizers.update_rule import named_chain
from apps.trainer.paths import flatten_paths, is_stacked, path_str
from apps.trainer.run_config import ScheduleSettings
from apps.trainer.schedules import Schedule, make_schedule

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Configuration of the optimizer of one stage; the defaults are the published recipe.

  `run_config.OptimizerSettings` checks the values.

  Attributes:
    learning_rate: peak rate, already scaled to the batch (`schedules.scaled_learning_rate`).
    schedule: multiplier of the learning rate over the steps.
    rule: update rule with its hyperparameters, of a type in `OPTIMIZERS`.
    weight_decay: decoupled weight decay, multiplied by the scheduled learning rate.
    decay_regex: regex of the parameters with weight decay.
    grad_clip_norm: maximum global L2 norm of the gradients; None disables clipping.
    lr_multipliers: (regex, factor) pairs; the first match of a path applies.
    layer_decay: r in (0, 1]; None disables layer-wise decay.
    layer_decay_regex: regex of the paths with layer-wise decay, e.g. "^encoder/".
    input_regex: regex of the paths that layer-wise decay treats as preceding the blocks:
      embeddings, positions and cls.
    frozen: regexes of parameters that keep their value and get no optimizer state.
    last_blocks: (regex, N) pairs; of stacked parameters that match, only the last N blocks are
      trained. The first match of a path applies. The other blocks keep their value.
    ema_decay: decay of an average of the parameters in the train state; None disables it. The
      average starts at the initial parameters and is not debiased; its decay at step t is
      min(ema_decay, (1 + t) / (10 + t)), so that early parameters fade quickly.
  """

  learning_rate: float
  schedule: ScheduleSettings = ScheduleSettings()
  rule: UpdateRule = AdamW()
  weight_decay: float = 0.2
  decay_regex: str = r"(^|/)kernel$"
  grad_clip_norm: float | None = None
  lr_multipliers: tuple[tuple[str, float], ...] = ()
  layer_decay: float | None = None
  layer_decay_regex: str = ""
  input_regex: str = r"(^|/)(patch_embed\w*|embed\w*|pos\w*|cls)(/|$)"
  frozen: tuple[str, ...] = ()
  last_blocks: tuple[tuple[str, int], ...] = ()
  ema_decay: float | None = None


class Optimizer(NamedTuple):
  """Output of `make_optimizer`.

  Attributes:
    tx: gradient transformation; its `update` needs the params.
    learning_rate: step -> learning rate of parameters with multiplier 1, float32 [].
    trainable: tree of the params with True for updated parameters, False for frozen ones, and a
      bool array [L, 1, ...] for stacked parameters of which some blocks are frozen.
    groups: path -> "frozen" or a short description of decay and multiplier, for logs and tests.
  """

  tx: optax.GradientTransformation
  learning_rate: Schedule
  trainable: PyTree
  groups: dict[str, str]


def make_optimizer(config: OptimizerConfig, abstract_params: PyTree, total_steps: int) -> Optimizer:
  """Build the chain for the paths and shapes of the parameters, without allocating arrays.

  Args:
    config: configuration of the optimizer.
    abstract_params: nested dict of arrays or ShapeDtypeStructs.
    total_steps: number of optimizer steps of the run, for the schedule.

  Raises:
    ValueError: a regex of frozen, last_blocks or lr_multipliers matches no parameter, all
      parameters are frozen, or layer-wise decay finds no stacked blocks.
  """
  shapes = flatten_paths(abstract_params)
  _require_matches("frozen", config.frozen, shapes)
  _require_matches("lr_multipliers", [regex for regex, _ in config.lr_multipliers], shapes)
  stacked = {path: leaf for path, leaf in shapes.items() if is_stacked(path)}
  _require_matches("last_blocks", [regex for regex, _ in config.last_blocks], stacked)
  trained = {path: _trained(config, path, leaf) for path, leaf in shapes.items()}
  frozen = {path: not np.any(blocks) for path, blocks in trained.items()}
  if all(frozen.values()):
    raise ValueError(f"frozen={config.frozen!r} freezes every parameter; nothing is left to train.")
  decayed = {path: bool(re.search(config.decay_regex, path)) for path in shapes}
  multipliers = {
    path: factor if isinstance(trained[path], bool) else factor * trained[path]
    for path, factor in _multipliers(config, shapes).items()
  }

  def tree(by_path: dict[str, Any]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda p, _: by_path[path_str(p)], abstract_params)

  has_state = tree({path: not is_frozen for path, is_frozen in frozen.items()})
  multiplier = make_schedule(config.schedule, total_steps)
  clip = optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm else None
  name = next(name for name, kind in OPTIMIZERS.items() if type(config.rule) is kind)
  tx = named_chain(
    ("clip", optax.masked(clip, has_state) if clip else optax.identity()),
    (name, optax.masked(config.rule.build(), has_state)),
    ("weight_decay", optax.add_decayed_weights(config.weight_decay, mask=tree(decayed))),
    ("rate", optax.scale(config.learning_rate)),
    ("multipliers", _scale_by_multipliers(tree(multipliers))),
    ("schedule", optax.scale_by_schedule(multiplier)),
    ("frozen", optax.masked(optax.set_to_zero(), tree(frozen))),
    ("sign", optax.scale(-1.0)),
  )
  return Optimizer(
    tx=tx,
    learning_rate=lambda step: config.learning_rate * multiplier(step),
    trainable=tree(trained),
    groups={path: _describe(frozen[path], decayed[path], multipliers[path]) for path in shapes},
  )


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
  """Return the average after one step, as described in `OptimizerConfig.ema_decay`.

  Args:
    ema: float32 average before the step.
    params: parameters after the step.
    decay: maximum decay.
    step: int32 [], number of updates before the one that produced `params`.
  """
  t = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)


def summarize_groups(groups: dict[str, str]) -> str:
  """Return one line per group with its number of arrays and the first paths."""
  by_group: dict[str, list[str]] = {}
  for path, group in groups.items():
    by_group.setdefault(group, []).append(path)
  return "\n".join(
    f"{group}: {len(paths)} arrays ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
    for group, paths in sorted(by_group.items())
  )


def _trained(config: OptimizerConfig, path: str, leaf: Any) -> bool | np.ndarray:
  """Return whether a parameter is trained, or a bool array [L, 1, ...] of its blocks."""
  if _any_match(config.frozen, path):
    return False
  count = next((n for regex, n in config.last_blocks if re.search(regex, path)), None)
  if count is None or not is_stacked(path) or count >= leaf.shape[0]:
    return True
  blocks = np.arange(leaf.shape[0]) >= leaf.shape[0] - count
  return blocks.reshape(-1, *[1] * (leaf.ndim - 1))


def _multipliers(config: OptimizerConfig, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return path -> factor: float32 [], or [L, 1, ...] for stacked blocks."""
  depths = {
    path[: path.index("blocks/")]: leaf.shape[0]
    for path, leaf in shapes.items()
    if is_stacked(path) and re.search(config.layer_decay_regex, path)
  }  # tower prefix, e.g. "encoder/" -> L
  if config.layer_decay is not None and not depths:
    raise ValueError(
      f"layer_decay={config.layer_decay} finds no stacked `blocks/` under "
      f"layer_decay_regex={config.layer_decay_regex!r}; examples of paths: "
      f"{', '.join(list(shapes)[:3])}."
    )

  def of(path: str, leaf: Any) -> np.ndarray:
    factor = next((f for regex, f in config.lr_multipliers if re.search(regex, path)), 1.0)
    rate, decays = config.layer_decay, re.search(config.layer_decay_regex, path)
    tower = max((t for t in depths if path.startswith(t)), key=len, default=None)
    if rate is None or not decays or tower is None:
      return np.asarray(factor, np.float32)
    depth = depths[tower]
    if is_stacked(path):
      by_layer = rate ** (depth - np.arange(depth, dtype=np.float32))
      return np.asarray(factor * by_layer, np.float32).reshape(depth, *[1] * (leaf.ndim - 1))
    if re.search(config.input_regex, path[len(tower) :]):
      return np.asarray(factor * rate ** (depth + 1), np.float32)
    return np.asarray(factor, np.float32)

  return {path: of(path, leaf) for path, leaf in shapes.items()}


def _scale_by_multipliers(multipliers: PyTree) -> optax.GradientTransformation:
  def scaled(u: jax.Array, m: np.ndarray) -> jax.Array:
    if np.all(m == 1):  # keeps the arithmetic of the plain chain
      return u
    # The update of a frozen block is +0, because -0.0 + 0.0 would change the sign bit.
    return jnp.where(m == 0, 0, u * m) if np.any(m == 0) else u * m

  def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
    del params
    return jax.tree.map(scaled, updates, multipliers)

  return optax.stateless(update)


def _any_match(regexes: Sequence[str], path: str) -> bool:
  return any(re.search(regex, path) for regex in regexes)


def _require_matches(name: str, regexes: Sequence[str], shapes: dict[str, Any]) -> None:
  for regex in regexes:
    if not any(re.search(regex, path) for path in shapes):
      raise ValueError(
        f"{name} regex {regex!r} matches no parameter; examples of paths: "
        f"{', '.join(list(shapes)[:: max(1, len(shapes) // 6)])}."
      )


def _describe(frozen: bool, decayed: bool, multiplier: np.ndarray) -> str:
  if frozen:
    return "frozen"
  low, high = float(np.min(multiplier)), float(np.max(multiplier))
  rate = "" if low == high == 1 else f", lr x {low:.4g}" + (f"..{high:.4g}" if low < high else "")
  return ("decayed" if decayed else "not decayed") + rate
