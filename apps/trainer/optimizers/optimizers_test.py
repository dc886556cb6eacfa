"""Tests of every optimizer against a float64 reference per layer."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.optimizers import OPTIMIZERS, Adafactor, AdamW, Lion, Muon
from apps.trainer.paths import flatten_paths, is_stacked
from apps.trainer.run_config import ScheduleSettings
import ov_models

L, STEPS = 3, 4
SHAPES = {
  "encoder/patch_embed/kernel": (2, 2, 3, 4),
  "encoder/cls": (4,),
  "encoder/position_embedding": (5, 4),
  "encoder/blocks/attn/kernel": (L, 4, 4),
  "encoder/blocks/mlp/up/kernel": (L, 4, 9),
  "encoder/blocks/mlp/down/kernel": (L, 9, 4),
  "encoder/blocks/mlp/down/bias": (L, 4),
  "encoder/norm/scale": (4,),
  "text/blocks/mlp/kernel": (2, 4, 7),  # a tower of another depth
  "text/head/kernel": (4, 6),
}
CONFIG = dict(
  schedule=ScheduleSettings(warmup_steps=2),
  weight_decay=0.3,
  grad_clip_norm=1.0,
  lr_multipliers=(("head", 2.0),),
  layer_decay=0.5,
  layer_decay_regex="^encoder/",
  frozen=("/cls$",),
)
FLOAT32 = AdamW(mu_dtype="float32")
RULES = {
  "adamw": FLOAT32,
  "lion": Lion(mu_dtype="float32"),
  "adafactor": Adafactor(min_dim_size_to_factor=4),
  "adafactor, relative, with momentum": Adafactor(
    min_dim_size_to_factor=4, clipping_threshold=0.5, scale_parameters=True, momentum=0.9
  ),
  "muon": Muon(mu_dtype="float32", adamw=FLOAT32),
  "muon, plain": Muon(0.9, 3, False, "float32", consistent_rms=0.0, adamw=FLOAT32),
}


def tree(by_path):
  nested = {}
  for path, leaf in by_path.items():
    *parents, last = path.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, nested)[last] = leaf
  return nested


def random(seed):
  rng = np.random.default_rng(seed)
  return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def adam_direction(rule, g, memory, t):
  m = memory["m"] = rule.b1 * memory.get("m", 0) + (1 - rule.b1) * g
  v = memory["v"] = rule.b2 * memory.get("v", 0) + (1 - rule.b2) * g**2
  return m / (1 - rule.b1**t) / (np.sqrt(v / (1 - rule.b2**t)) + rule.eps)


def lion_direction(rule, g, memory):
  m = memory.get("m", 0)
  memory["m"] = rule.b2 * m + (1 - rule.b2) * g
  return np.sign(rule.b1 * m + (1 - rule.b1) * g)


def rms(x):
  return np.sqrt(np.mean(x**2))


def adafactor_direction(rule, g, w, memory, t):
  decay = 1 - t**-rule.decay_rate
  average = lambda name, x: memory.update({name: decay * memory.get(name, 0) + (1 - decay) * x})
  if g.ndim == 2 and min(g.shape) >= rule.min_dim_size_to_factor:
    average("rows", np.mean(g**2, axis=1))
    average("columns", np.mean(g**2, axis=0))
    v = np.outer(memory["rows"], memory["columns"]) / memory["rows"].mean()
  else:
    average("v", g**2)
    v = memory["v"]
  out = g / np.sqrt(v)
  out /= max(1, rms(out) / rule.clipping_threshold)
  if rule.scale_parameters:
    out *= max(rms(w), 1e-3)
  if rule.momentum:
    out = memory["m"] = rule.momentum * memory.get("m", 0) + (1 - rule.momentum) * out
  return out


def muon_direction(rule, g, memory, t):
  beta = rule.beta
  m = memory["m"] = beta * memory.get("m", 0) + (1 - beta) * g
  x = m / (1 - beta**t)
  if rule.nesterov:
    x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
  x = x / np.linalg.norm(x)
  for _ in range(rule.steps):  # Newton-Schulz
    a = x @ x.T
    x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
  rows, columns = g.shape
  scale = rule.consistent_rms * np.sqrt(max(rows, columns))
  return x * (scale if rule.consistent_rms else np.sqrt(max(1, columns / rows)))


def direction(rule, path, g, w, memory, t):
  """Return the update direction of one array or one layer, in float64."""
  if isinstance(rule, Muon):
    if "/blocks/" in path and path.endswith("/kernel"):
      return muon_direction(rule, g, memory, t)
    return adam_direction(rule.adamw, g, memory, t)
  if isinstance(rule, AdamW):
    return adam_direction(rule, g, memory, t)
  if isinstance(rule, Lion):
    return lion_direction(rule, g, memory)
  return adafactor_direction(rule, g, w, memory, t)


def multiplier(path, layer):
  if not path.startswith("encoder/"):
    return 2.0 if "head" in path else 1.0
  if layer is not None:
    return 0.5 ** (L - layer)
  return 0.5 ** (L + 1) if re.search("patch_embed|position", path) else 1.0


def naive(rule):
  """Yield the params after each step, in float64, layer by layer."""
  params = {path: x.astype(np.float64) for path, x in random(0).items()}
  memories = {}
  history = []
  for t in range(1, STEPS + 1):
    grads = {path: x.astype(np.float64) for path, x in random(t).items() if path != "encoder/cls"}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    rate = 0.01 * min(1, (t - 1) / 2) * 0.5 * (1 + np.cos(np.pi * max(0, t - 3) / 8))
    for path, g in grads.items():
      layers = range(len(g)) if "/blocks/" in path else [None]
      for layer in layers:
        at = Ellipsis if layer is None else layer
        memory = memories.setdefault((path, layer), {})
        w = params[path][at]
        step = direction(rule, path, g[at] / norm, w, memory, t)
        step = step + (0.3 * w if path.endswith("/kernel") else 0)
        params[path][at] -= rate * multiplier(path, layer) * step
    history.append({path: x.copy() for path, x in params.items()})
  return history


@pytest.mark.parametrize("name", RULES)
def test_four_steps_match_float64_reference(name):
  params = tree({path: jnp.asarray(x) for path, x in random(0).items()})
  start = flatten_paths(params)
  tx = make_optimizer(OptimizerConfig(0.01, rule=RULES[name], **CONFIG), params, 10).tx

  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(grads, opt, params):
    updates, opt = tx.update(grads, opt, params)
    return jax.tree.map(jnp.add, params, updates), opt

  opt = tx.init(params)
  for t, expected in enumerate(naive(RULES[name]), 1):
    params, opt = step(tree({p: jnp.asarray(x) for p, x in random(t).items()}), opt, params)
    for path, x in flatten_paths(params).items():
      if t == 1 or path == "encoder/cls":  # warm-up from 0; frozen
        np.testing.assert_array_equal(x, start[path], err_msg=path)
      # Updates are about 0.01. Five iterations enlarge the rounding of small singular values by
      # up to 3.4^5; the parameters themselves are rounded to 2^-24 of about 1 in each step.
      np.testing.assert_allclose(x, expected[path], rtol=0, atol=1e-6, err_msg=path)


def test_singular_values_of_muon_are_near_one_in_each_layer():
  """A layer with 1,000 times larger gradients does not affect the others."""
  grads = jnp.asarray(np.random.default_rng(0).normal(size=(L, 8, 8)), jnp.float32)
  grads = {"blocks": {"kernel": grads * jnp.array([1.0, 1e3, 1e-3])[:, None, None]}}
  tx = Muon(consistent_rms=0.0).build()
  updates, _ = tx.update(grads, tx.init(grads), grads)
  values = np.linalg.svd(updates["blocks"]["kernel"], compute_uv=False)
  assert values.min() > 0.1 and values.max() < 1.3  # coefficients overshoot on purpose


@functools.cache
def openvision(variant):
  config = ov_models.VisionLanguageConfig.from_names(
    variant, "Ti", "Ti", image_size=224, vocab_size=32_000
  )
  return ov_models.abstract_params(config)


def test_muon_updates_block_kernels_only():
  params = openvision("Ti/16")
  state = flatten_paths(jax.eval_shape(Muon().build().init, params))
  having = lambda prefix: {p.removeprefix(prefix) for p in state if p.startswith(prefix)}
  muon, adamw = having("muon/inner_state/mu/"), having("adamw/inner_state/nu/")
  assert muon | adamw == flatten_paths(params).keys() and not muon & adamw
  assert muon == {p for p in flatten_paths(params) if is_stacked(p) and p.endswith("/kernel")}
  assert {"encoder/patch_embed/kernel", "text/embed/embedding", "image_head/kernel"} <= adamw
  assert {"encoder/blocks/mlp/up/bias", "decoder/head/kernel", "log_scale"} <= adamw


@pytest.mark.parametrize(
  ("name", "variant", "expected"),
  [
    ("adamw", "Ti/16", 6.0),
    ("adamw", "L/14", 6.0),
    ("lion", "Ti/16", 2.0),
    ("lion", "L/14", 2.0),
    ("muon", "Ti/16", 3.776),
    ("muon", "L/14", 2.177),
    ("adafactor", "Ti/16", 0.0621),
    ("adafactor", "L/14", 0.0195),
  ],
)
def test_bytes_per_parameter(name, variant, expected):
  """Values of the table in docs/one_gpu.md."""
  params = openvision(variant)
  state = jax.eval_shape(OPTIMIZERS[name]().build().init, params)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert size / ov_models.num_params(params) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: AdamW(b2=1.0), r"b2=1.0 must be in \[0, 1\)"),
    (lambda: AdamW(eps=float("nan")), "eps=nan must be finite and > 0"),
    (
      lambda: AdamW(mu_dtype="float16"),
      "mu_dtype='float16' must be one of bfloat16, ",
    ),
    (
      lambda: AdamW(second_moment="int4"),
      "second_moment='int4' must be one of full, f",
    ),
    (lambda: Lion(b1=-0.1), r"b1=-0.1 must be in \[0, 1\)"),
    (lambda: Lion(mu_dtype="int8"), "mu_dtype='int8' must be one of bfloat16, float32"),
    (lambda: Muon(beta=1.0), r"beta=1.0 must be in \[0, 1\)"),
    (lambda: Muon(steps=0), "steps=0 must be at least 1"),
    (lambda: Muon(consistent_rms=-1.0), "consistent_rms=-1.0 must be finite and > 0"),
    (lambda: Adafactor(decay_rate=0.0), r"decay_rate=0.0 must be in \(0, 1\]"),
    (lambda: Adafactor(min_dim_size_to_factor=1), "min_dim_size_to_factor=1 must be at least 2"),
    (lambda: Adafactor(clipping_threshold=0.0), "clipping_threshold=0.0 must be finite and > 0"),
    (lambda: Adafactor(momentum=1.0), r"momentum=1.0 must be in \[0, 1\)"),
  ],
)
def test_invalid_hyperparameters(make, message):
  with pytest.raises(ValueError, match=message):
    make()
