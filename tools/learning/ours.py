"""Training by the trainer: the task, optimizer and jitted step of an app on the batches on disk."""

from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from apps.trainer import state as states
from apps.trainer.augment import MEAN, STD, make_preprocess, normalise
from apps.trainer.config import augment_config, optimizer_config
from apps.trainer.losses.loss_term import LossOutput
from apps.trainer.optimizer import make_optimizer
from apps.trainer.parts import Plan
from apps.trainer.paths import flatten_paths
from apps.trainer.run_config import RunConfig
from apps.trainer.schedules import make_schedule
from apps.trainer.stages import resolve_stages
from apps.trainer.step import make_train_step
from ov_convert import open_clip, timm_vit, torch_module
from ov_convert.release import Preprocess, Release, TokenizerSpec
import ov_losses
import ov_models
import ov_sharding
from tools.learning import batches as batches_lib
from tools.learning.batches import Batches
from tools.learning.recipes import Recipe
from tools.learning.trained import CURVES, Arrays, Trained
from tools.preflight import compile as preflight
from tools.preflight import configs

ROOT = Path(__file__).parents[2]
Params = Any
Step = Callable[[Any, dict[str, jax.Array]], tuple[Any, dict[str, jax.Array]]]
_WIDTH, _MLP = 128, 512
_TOWER = {"width": _WIDTH, "mlp_dim": _MLP, "num_heads": 4}


class Training(NamedTuple):
  """A training before its first step.

  Attributes:
    recipe: settings.
    model: configuration of the model.
    params: initial parameters on the host.
    state: train state with these parameters.
    step: the jitted train step.
    gradient: parameters, batch -> loss and its gradient, jitted.
    outputs: parameters -> outputs for held-out data.
    batch: examples int [B] -> batch of the step.
  """

  recipe: Recipe
  model: Any
  params: Params
  state: Any
  step: Step
  gradient: Callable[[Params, dict[str, jax.Array]], tuple[jax.Array, Params]]
  outputs: Callable[[Params], dict[str, jax.Array]]
  batch: Callable[[np.ndarray], dict[str, Any]]


def settings(recipe: Recipe) -> RunConfig:
  """Return the configuration of a recipe: a demo of an app with the settings of the recipe."""
  caption = recipe.loss == "caption"
  # open_clip and timm train the positions of the image tower; the module computes them.
  position = "sincos2d" if caption else "learned"
  # The classifier is the image tower of the CLIP model.
  loss = "clip" if recipe.loss == "classify" else recipe.loss
  file = "caption_demo.py" if caption else f"clip_demo.py:loss={loss}"
  config = configs.resolved(str(ROOT / "apps/configs" / file))
  changes = {
    "batch_size": recipe.batch_size,
    "total_steps": recipe.steps,
    "model.encoder": "Ti/8",
    "model.image_size": batches_lib.IMAGE_SIZE,
    "model.encoder_options": _TOWER | {"depth": 2, "position": position},
    "optimizer.learning_rate": recipe.learning_rate,
    "optimizer.schedule.warmup_steps": recipe.warmup_steps,
    "optimizer.weight_decay": recipe.weight_decay,
    "optimizer.decay_regex": recipe.decay_regex,
    "optimizer.grad_clip_norm": recipe.grad_clip_norm,
    "optimizer.mu_dtype": recipe.mu_dtype,
    "loss.max_scale": recipe.max_scale,
  }
  changes |= {f"optimizer.{name}": getattr(recipe, name) for name in ("b1", "b2", "eps")}
  if caption:
    changes["model.decoder_options"] = _TOWER | {"depth": 2}
    changes["model.token_len"] = batches_lib.CAPTION_LEN + 1
  else:
    changes["model.text_options"] = _TOWER | {"depth": 1}
    changes["model.token_len"] = batches_lib.TEXT_LEN
  return config.with_settings(changes)


@functools.lru_cache(maxsize=1)  # sides and orders of a recipe follow each other
def prepare(recipe: Recipe, batches: Batches, devices: int) -> Training:
  """Return the training of a recipe on the first `devices` devices."""
  mesh = ov_sharding.make_mesh(ov_sharding.MeshConfig(), jax.devices()[:devices])
  (stage,) = resolve_stages(settings(recipe))
  plan = preflight.make_plan(stage, batches.tokenizer(), mesh)
  if recipe.loss == "classify":
    return _classifier(recipe, plan, batches)
  task: Any = plan.parts.task
  # Compiled for one device, so that every mesh starts from the same bits.
  params = jax.tree.map(np.asarray, jax.jit(task.init)(jax.random.key(0)))
  state = states.new_state(params, plan.parts.optimizer.tx)
  names = {"image": "image", "alt_ids": "text", "ids": "caption"}
  used = {key: name for key, name in names.items() if key in plan.batch}

  def batch(rows: np.ndarray) -> dict[str, Any]:
    arrays = {key: batches.array(name)[rows] for key, name in used.items()}
    return jax.device_put(_with_rows(arrays), {k: v.sharding for k, v in plan.batch.items()})

  held_out = {key: jnp.asarray(batches.array(f"held_out_{name}")) for key, name in used.items()}

  @jax.jit
  def outputs(params: Params, data: dict[str, jax.Array]) -> dict[str, jax.Array]:
    images = normalise(data["image"])
    if recipe.loss == "caption":
      hidden = ov_models.bind(task.model, params)(images, data["ids"]).hidden
      targets, mask = ov_losses.shift_left(data["ids"], task.pad_id)
      log_p = jax.nn.log_softmax(hidden @ params["decoder"]["head"]["kernel"])
      nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
      return {"nll": jnp.where(mask, nll, 0.0).sum(-1) / mask.sum(-1)}
    out = ov_models.bind(task.model, params)(images, texts=data["alt_ids"][:, None])
    assert out.text is not None  # recipes other than captioning have two towers
    return {"image": out.image.unit, "text": out.text.unit[:, 0]}

  state = jax.device_put(state, plan.parts.shardings)
  evaluate = lambda params: outputs(params, held_out)
  gradient = _gradient(lambda params, batch: task.loss(params, batch, jax.random.key(0)).loss)
  return Training(recipe, task.model, params, state, plan.step(), gradient, evaluate, batch)


def _gradient(
  loss: Callable[[Params, dict[str, jax.Array]], jax.Array],
) -> Callable[[Params, dict[str, jax.Array]], tuple[jax.Array, Params]]:
  """Return the jitted loss and gradient of a batch with uint8 images."""

  def of_batch(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    return loss(params, batch | {"image": normalise(batch["image"])})

  return jax.jit(jax.value_and_grad(of_batch))


def _with_rows(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  size = len(arrays["image"])
  return arrays | {"valid": np.ones(size, bool), "index": np.arange(size, dtype=np.int32)}


def _classifier(recipe: Recipe, plan: Plan, batches: Batches) -> Training:
  """Return supervised training: the image tower of a plan with a linear head of the classes."""
  model = plan.parts.task.model.encoder
  classes = int(batches.array("label").max()) + 1
  head = {
    "kernel": 0.02 * jax.random.normal(jax.random.key(1), (model.width, classes)),
    "bias": jnp.zeros(classes),
  }
  params = {"encoder": jax.jit(lambda key: ov_models.init(model, key))(jax.random.key(0))}
  params = jax.tree.map(np.asarray, params | {"head": head})

  def logits(params: Params, images: jax.Array) -> jax.Array:
    pooled = ov_models.bind(model, params["encoder"])(images).pooled
    return pooled.astype(jnp.float32) @ params["head"]["kernel"] + params["head"]["bias"]

  def loss(params: Params, batch: Any, key: Any, ema: Any, step: Any) -> LossOutput:
    del key, ema, step
    log_p = jax.nn.log_softmax(logits(params, batch["image"]))
    target = jax.nn.one_hot(batch["label"], classes)
    smooth = (1 - recipe.label_smoothing) * target + recipe.label_smoothing / classes
    return LossOutput(-(smooth * log_p).sum(-1).mean(), jnp.ones(()), {})

  optimizer = make_optimizer(optimizer_config(plan.config), params, recipe.steps)
  state = states.new_state(params, optimizer.tx)
  replicated = NamedSharding(plan.mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: replicated, state)
  rows = ov_sharding.batch_sharding(plan.mesh)
  step = make_train_step(
    loss, optimizer.tx, state_shardings=shardings, batch_sharding=rows, seed=0,
    learning_rate=optimizer.learning_rate,
    preprocess=make_preprocess(augment_config(plan.config), 0),
  )  # fmt: skip

  def batch(rows_of_step: np.ndarray) -> dict[str, Any]:
    arrays = {name: batches.array(name)[rows_of_step] for name in ("image", "label")}
    return jax.device_put(arrays, rows)

  outputs = jax.jit(lambda params, images: {"logits": logits(params, normalise(images))})
  images = jnp.asarray(batches.array("held_out_image"))
  state = jax.device_put(state, shardings)
  evaluate = lambda params: outputs(params, images)
  gradient = _gradient(lambda params, batch: loss(params, batch, None, None, None).loss)
  return Training(recipe, model, params, state, step, gradient, evaluate, batch)


def export(training: Training, batches: Batches, folder: Path) -> None:
  """Write the initial parameters in the format of the library of the recipe."""
  tokenizer, library = batches.tokenizer(), training.recipe.library
  words = TokenizerSpec(
    tokenizer.to_json(), batches_lib.CAPTION_LEN if library == "twin" else batches_lib.TEXT_LEN,
    library != "twin", tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id,
    tokenizer.cls_id,
  )  # fmt: skip
  params = training.params["encoder"] if library == "timm" else training.params
  preprocess = Preprocess(batches_lib.IMAGE_SIZE, "squash", MEAN, STD)
  release = Release(training.model, params, preprocess, None if library == "timm" else words)
  write = {"open_clip": open_clip.write, "twin": torch_module.write, "timm": timm_vit.write}
  write[library](folder, release)
  if library == "timm":
    np.savez(folder / "head.npz", **training.params["head"])


def train(training: Training, batches: Batches, order: int, stop: int | None = None) -> Trained:
  """Train with the trainer.

  Args:
    training: the training before its first step.
    batches: arrays to read.
    order: summation order of the rows of each batch.
    stop: number of steps, if less than the recipe's.
  """
  recipe, rows = training.recipe, batches.rows
  state = jax.tree.map(lambda x: jnp.array(x, copy=True), training.state)  # the step donates it
  metrics = []
  for number in range(stop or recipe.steps):
    batch = training.batch(rows(number, recipe.batch_size, order))
    state, found = training.step(state, batch)
    # Fetched at once: collectives of several steps in flight block each other on simulated devices.
    metrics.append({name: float(found[name]) for name in CURVES if name in found})
  return _trained(training, state["params"], metrics)


def train_by_hand(
  training: Training, batches: Batches, order: int, stop: int | None = None
) -> Trained:
  """Train with an AdamW written in numpy, without optax or the step of the trainer.

  Only loss, gradient and schedule are shared with `train`, which has the same arguments.
  """
  recipe = training.recipe
  rate_of = make_schedule(optimizer_config(settings(recipe)).schedule, recipe.steps)
  params = jax.tree.map(np.array, training.params)
  adam = [_HandAdam(path, value, recipe) for path, value in flatten_paths(params).items()]
  metrics = []
  for number in range(stop or recipe.steps):
    batch = training.batch(batches.rows(number, recipe.batch_size, order))
    loss, tree = training.gradient(params, batch)
    grads = [np.asarray(g) for g in flatten_paths(tree).values()]
    norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads)))
    metrics.append({"loss": float(loss), "grad_norm": norm})
    if "log_scale" in params:
      metrics[-1]["scale"] = float(np.exp(params["log_scale"]))
    factor = min(1.0, (recipe.grad_clip_norm or np.inf) / norm)
    for one, g in zip(adam, grads, strict=True):
      one.update(np.float32(factor) * g, recipe.learning_rate * float(rate_of(number)))
    if "log_scale" in params and recipe.max_scale:
      np.clip(params["log_scale"], 0, np.log(recipe.max_scale), out=params["log_scale"])
  return _trained(training, params, metrics)


class _HandAdam:
  """AdamW of one array in float32, as in algorithm 2 of https://arxiv.org/abs/1711.05101."""

  def __init__(self, path: str, value: np.ndarray, recipe: Recipe) -> None:
    self._value, self._recipe, self._step = value, recipe, 0
    self._m, self._v = np.zeros_like(value), np.zeros_like(value)
    # Written out here, independent of `decay_regex`; timm does not decay positions.
    decayed = ("kernel",) if recipe.library == "timm" else ("kernel", "embedding")
    self._decay = recipe.weight_decay if path.endswith(decayed) else 0.0

  def update(self, gradient: np.ndarray, rate: float) -> None:
    """Change the array in place."""
    b1, b2 = self._recipe.b1, self._recipe.b2
    self._step += 1
    self._m += np.float32(1 - b1) * (gradient - self._m)
    self._v += np.float32(1 - b2) * (gradient * gradient - self._v)
    m = self._m / np.float32(1 - b1**self._step)
    v = self._v / np.float32(1 - b2**self._step)
    direction = m / (np.sqrt(v) + np.float32(self._recipe.eps))
    self._value -= np.float32(rate) * (direction + np.float32(self._decay) * self._value)


def _trained(training: Training, params: Params, metrics: list[dict[str, float]]) -> Trained:
  return Trained(
    {name: np.array([step[name] for step in metrics], np.float64) for name in metrics[0]},
    {path: np.asarray(value) for path, value in flatten_paths(params).items()},
    {name: np.asarray(value) for name, value in training.outputs(params).items()},
  )


def our_names(training: Training, theirs: Trained) -> Trained:
  """Return a result of PyTorch with its weights under our paths."""
  library, weights = training.recipe.library, theirs.weights
  if library == "twin":
    return theirs
  head: Arrays = {}
  if library == "timm":
    head = {"head/kernel": weights["head.weight"].T, "head/bias": weights["head.bias"]}
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
  names = {"open_clip": open_clip.name_map, "timm": timm_vit.name_map}[library](training.model)
  flat = flatten_paths(names.to_ours(weights, training.model))
  prefix = "encoder/" if library == "timm" else ""
  ours = {prefix + path: np.asarray(value) for path, value in flat.items()} | head
  return Trained(theirs.curves, ours, theirs.outputs)
