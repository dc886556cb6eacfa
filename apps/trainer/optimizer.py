"""The optimizer of a stage: an update rule in a chain that all rules share.

  make_optimizer(config, abstract_params, total_steps) -> Optimizer(tx, learning_rate, groups)

The chain, in this order. The names are the keys of its state in checkpoints, where only "NAME" and
"schedule" have a state:

  clip           clip_by_global_norm(grad_clip_norm), or identity
  NAME           the update rule by its name in `optimizers.OPTIMIZERS`, such as "adamw"; it has no
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

Paths are the keys of the nested dict joined by "/", e.g. `encoder/blocks/attn/query/kernel`;
a regex matches when `re.search` finds it in the path, so anchor it with ^ and $ where that matters.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apps.trainer.optimizers import OPTIMIZERS, AdamW, UpdateRule
from apps.trainer.optimizers.update_rule import named_chain
from apps.trainer.paths import flatten_paths, is_stacked, path_str
from apps.trainer.schedules import Schedule, ScheduleConfig, make_schedule

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer of one stage; the defaults of the chain are the published recipe.

  Attributes:
    learning_rate: peak rate, already scaled to the batch (`schedules.scaled_learning_rate`).
    schedule: its multiplier over the steps.
    rule: update rule with its hyperparameters, of a type in `OPTIMIZERS`.
    weight_decay: decoupled, times the scheduled learning rate.
    decay_regex: which parameters decay.
    grad_clip_norm: global L2 norm to which gradients are scaled down; None for no clipping.
    lr_multipliers: (regex, factor) pairs; the first that matches a path counts.
    layer_decay: r in (0, 1], or None for none.
    layer_decay_regex: paths to which the layer-wise decay applies, e.g. "^encoder/".
    input_regex: paths that layer-wise decay counts as standing before the blocks: embeddings,
      positions and cls.
    frozen: regexes of parameters that keep their value and get no optimizer state.
    ema_decay: decay of an average of the parameters kept in the train state, None for none. The
      average starts at the initial parameters and is not debiased; its decay at step t is
      min(ema_decay, (1 + t) / (10 + t)), so that early parameters fade quickly.
  """

  learning_rate: float
  schedule: ScheduleConfig = ScheduleConfig()
  rule: UpdateRule = AdamW()
  weight_decay: float = 0.2
  decay_regex: str = r"(^|/)kernel$"
  grad_clip_norm: float | None = None
  lr_multipliers: tuple[tuple[str, float], ...] = ()
  layer_decay: float | None = None
  layer_decay_regex: str = ""
  input_regex: str = r"(^|/)(patch_embed\w*|embed\w*|pos\w*|cls)(/|$)"
  frozen: tuple[str, ...] = ()
  ema_decay: float | None = None

  def __post_init__(self) -> None:
    def require(ok: bool, name: str, expected: str) -> None:
      if not ok:
        raise ValueError(f"optimizer {name}={getattr(self, name)!r} must be {expected}.")

    require(0 <= self.learning_rate < math.inf, "learning_rate", "finite and >= 0")
    require(0 <= self.weight_decay < math.inf, "weight_decay", "finite and >= 0")
    clip, layer, ema = self.grad_clip_norm, self.layer_decay, self.ema_decay
    require(
      clip is None or 0 < clip < math.inf,
      "grad_clip_norm",
      "> 0 and finite, or None for no clipping",
    )
    require(layer is None or 0 < layer <= 1, "layer_decay", "in (0, 1], or None for none")
    for regex, factor in self.lr_multipliers:
      require(0 <= factor < math.inf, "lr_multipliers", f"finite and >= 0 for {regex!r}")
    for name, regexes in (
      ("decay_regex", [self.decay_regex]),
      ("layer_decay_regex", [self.layer_decay_regex]),
      ("input_regex", [self.input_regex]),
      ("frozen", self.frozen),
      ("lr_multipliers", [regex for regex, _ in self.lr_multipliers]),
    ):
      for regex in regexes:
        _check_regex(name, regex)
    require(ema is None or 0 < ema < 1, "ema_decay", "in (0, 1), or None for no average")


class Optimizer(NamedTuple):
  """What `make_optimizer` builds.

  Attributes:
    tx: the gradient transformation; its `update` needs the params.
    learning_rate: step -> learning rate of parameters with multiplier 1, float32 [].
    trainable: the params tree with True where a parameter is updated.
    groups: path -> "frozen" or a short text of decay and multiplier, for the log and for tests.
  """

  tx: optax.GradientTransformation
  learning_rate: Schedule
  trainable: PyTree
  groups: dict[str, str]


def make_optimizer(config: OptimizerConfig, abstract_params: PyTree, total_steps: int) -> Optimizer:
  """Builds the chain for the parameters' paths and shapes; nothing is allocated.

  Args:
    config: see `OptimizerConfig`.
    abstract_params: nested dict of arrays or ShapeDtypeStructs.
    total_steps: optimizer steps of the run, for the schedule.

  Raises:
    ValueError: if a regex of frozen or lr_multipliers matches no parameter, all are frozen, or
      layer-wise decay finds no stacked blocks.
  """
  shapes = flatten_paths(abstract_params)
  _require_matches("frozen", config.frozen, shapes)
  _require_matches("lr_multipliers", [regex for regex, _ in config.lr_multipliers], shapes)
  frozen = {path: _any_match(config.frozen, path) for path in shapes}
  if all(frozen.values()):
    raise ValueError(f"frozen={config.frozen!r} freezes every parameter; nothing is left to train.")
  decayed = {path: bool(re.search(config.decay_regex, path)) for path in shapes}
  multipliers = _multipliers(config, shapes)

  def tree(by_path: dict[str, Any]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda p, _: by_path[path_str(p)], abstract_params)

  trainable = tree({path: not is_frozen for path, is_frozen in frozen.items()})
  multiplier = make_schedule(config.schedule, total_steps)
  clip = optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm else None
  name = next(name for name, kind in OPTIMIZERS.items() if type(config.rule) is kind)
  tx = named_chain(
    ("clip", optax.masked(clip, trainable) if clip else optax.identity()),
    (name, optax.masked(config.rule.build(), trainable)),
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
    trainable=trainable,
    groups={path: _describe(frozen[path], decayed[path], multipliers[path]) for path in shapes},
  )


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
  """One step of the average described at `OptimizerConfig.ema_decay`; ema is float32.

  Args:
    step: int32 [], number of updates before the one that gave `params`.
  """
  t = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)


def summarize_groups(groups: dict[str, str]) -> str:
  """One line for each group with the number of its parameter arrays and the first paths."""
  by_group: dict[str, list[str]] = {}
  for path, group in groups.items():
    by_group.setdefault(group, []).append(path)
  return "\n".join(
    f"{group}: {len(paths)} arrays ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
    for group, paths in sorted(by_group.items())
  )


def _multipliers(config: OptimizerConfig, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
  """Path -> factor, float32 [] or, for stacked blocks, [L, 1, ...]."""
  depths = {
    path[: path.index("blocks/")]: leaf.shape[0]
    for path, leaf in shapes.items()
    if is_stacked(path) and re.search(config.layer_decay_regex, path)
  }  # tower prefix, e.g. "encoder/" -> L
  if config.layer_decay is not None and not depths:
    raise ValueError(
      f"layer_decay={config.layer_decay} finds no stacked `blocks/` under "
      f"layer_decay_regex={config.layer_decay_regex!r}; paths are such as "
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
  def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
    del params
    # A factor 1 is left out, which keeps the arithmetic of the plain chain.
    return jax.tree.map(lambda u, m: u if np.all(m == 1) else u * m, updates, multipliers)

  return optax.stateless(update)


def _check_regex(name: str, regex: str) -> None:
  try:
    re.compile(regex)
  except re.error as error:
    raise ValueError(f"optimizer {name}: {regex!r} is no regular expression: {error}.") from error


def _any_match(regexes: Sequence[str], path: str) -> bool:
  return any(re.search(regex, path) for regex in regexes)


def _require_matches(name: str, regexes: Sequence[str], shapes: dict[str, Any]) -> None:
  for regex in regexes:
    if not any(re.search(regex, path) for path in shapes):
      raise ValueError(
        f"{name} regex {regex!r} matches no parameter; paths are such as "
        f"{', '.join(list(shapes)[:: max(1, len(shapes) // 6)])}."
      )


def _describe(frozen: bool, decayed: bool, multiplier: np.ndarray) -> str:
  if frozen:
    return "frozen"
  low, high = float(np.min(multiplier)), float(np.max(multiplier))
  rate = "" if low == high == 1 else f", lr x {low:.4g}" + (f"..{high:.4g}" if low < high else "")
  return ("decayed" if decayed else "not decayed") + rate
