"""Compare two towers, losses and optimizer with the released OpenVision code, by the name map.

The golden arrays come from a small random model in float32 with full-precision matmuls.
OV_PRINT_GOLDEN=1 prints the largest difference of each array.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apps.trainer.optimizer import OptimizerConfig, make_optimizer
from apps.trainer.run_config import ScheduleSettings
from ov_convert import openvision_jax
import ov_losses
import ov_models

_CHECKPOINT = "openvision1_checkpoint/checkpoint.npz/5/default"

# From tests/golden/dims.json; the sizes are not those of a published variant.
CONFIG = ov_models.VisionLanguageConfig(
  encoder=ov_models.ViTConfig(
    width=64, depth=2, mlp_dim=128, num_heads=2, patch_size=8, image_size=32
  ),
  text=ov_models.TextConfig(
    width=48, depth=2, mlp_dim=96, num_heads=2, vocab_size=128, max_len=16,
    **ov_models.PRESETS["openvision_released"].text,
  ),
  decoder=ov_models.QueryDecoderConfig(
    width=40, depth=2, mlp_dim=80, num_heads=2, vocab_size=128, num_queries=12
  ),
  embed_dim=24,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(pathlib.Path(__file__).parent / "openvision1.npz"))


def under(arrays, prefix):
  return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def batch_of(golden):
  names = ("image_normalised", "labels1", "labels2", "autoreg_labels", "cap_loss_mask")
  return {name: golden[name] for name in names}


def total_loss(params, batch):
  """Return the published loss, 1 x contrastive + 2 x caption, and its terms."""
  model = ov_models.bind(CONFIG, params)
  image = model.encode_image(batch["image_normalised"])
  text = model.encode_text(jnp.concatenate([batch["labels1"], batch["labels2"]]))
  half = len(batch["labels1"])
  # The decoder reads the first of the two texts.
  hidden = model.caption_hidden(image.tokens, text_tokens=text.tokens[:half])
  contrastive = ov_losses.contrastive_softmax(
    image.unit, text.unit.reshape(2, half, -1), jnp.exp(params["log_scale"])
  ).loss
  caption = ov_losses.caption_cross_entropy(
    hidden, model.head_kernel, batch["autoreg_labels"], batch["cap_loss_mask"].astype(jnp.float32)
  ).loss
  total = contrastive + 2 * caption
  return total, {
    "image_tokens": image.tokens,
    "image_pooled_before_head": image.pooled,
    "image_projected_raw": image.raw,
    "zimg": image.unit,
    "ztxt": text.unit,
    "caption_logits": hidden @ model.head_kernel,
    "contrastive_loss": contrastive,
    "caption_loss": caption,
    "total_loss": total,
  }


@functools.cache
def gradient():
  return jax.jit(jax.value_and_grad(total_loss, has_aux=True))


@pytest.fixture(scope="module")
def evaluated(golden):
  """Return the outputs and gradients of our model at the golden parameters, by golden name."""
  with jax.default_matmul_precision("highest"):
    params = openvision_jax.to_ours(under(golden, "param/"), CONFIG)
    (_, outputs), grads = gradient()(params, batch_of(golden))
  return outputs, openvision_jax.to_theirs(grads, CONFIG)


def show(name, difference):
  if os.environ.get("OV_PRINT_GOLDEN"):
    print(f"{name}: largest difference {difference:.2g}")


def close(name, ours, theirs, tolerance, scale=None):
  """Check the largest difference relative to the largest entry or to `scale`."""
  assert np.shape(ours) == np.shape(theirs), name
  scale = np.abs(theirs).max() if scale is None else scale
  difference = np.abs(np.asarray(ours) - theirs).max()
  show(name, difference / scale)
  assert difference <= tolerance * scale, f"{name} differs by {difference / scale:.2g} relative"


OUTPUTS = (
  "image_tokens", "image_pooled_before_head", "image_projected_raw", "zimg", "ztxt",
  "caption_logits", "contrastive_loss", "caption_loss", "total_loss",
)  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_and_losses(name, golden, evaluated):
  # Float32 sums of up to 192 terms in different order.
  close(name, evaluated[0][name], golden[name], 1e-5)


def test_every_gradient(golden, evaluated):
  ours, theirs = evaluated[1], under(golden, "grad/")
  assert ours.keys() == theirs.keys()
  assert len(theirs) == 113
  for name, grad in theirs.items():
    if name.endswith("key/bias"):
      # Zero in exact arithmetic, because a constant added to all keys does not change the softmax.
      # Both sides are rounding errors, compared relative to the gradient of the query bias.
      scale = np.abs(theirs[name.replace("key/bias", "query/bias")]).max()
      close(f"grad/{name}, of the query bias", ours[name], grad, 1e-4, scale)
    else:
      close(f"grad/{name}", ours[name], grad, 1e-4)


@pytest.mark.parametrize("preset", ["default", "openvision_released", "clip"])
def test_a_wrong_formula_is_detected(preset, golden):
  # The comparison must fail for our other presets, which differ from the released code.
  text = ov_models.TextConfig(
    width=48, depth=2, mlp_dim=96, num_heads=2, vocab_size=128, max_len=16,
    **ov_models.PRESETS[preset].text,
  )  # fmt: skip
  flat = {n: a for n, a in under(golden, "param/").items() if n.startswith("txt/")}
  params = openvision_jax.to_ours(flat, text, ignore=["txt/head/kernel"])
  ids = np.concatenate([golden["labels1"], golden["labels2"]])
  pooled = jax.jit(lambda p, ids: ov_models.bind(text, p)(ids).pooled)(params, ids)
  z = pooled @ flat["txt/head/kernel"]
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  difference = np.abs(z - golden["ztxt"]).max()
  assert difference < 1e-5 if preset == "openvision_released" else difference > 1e-3


def test_five_optimizer_steps(golden):
  batch = batch_of(golden)
  start = under(golden, "param/")
  params = openvision_jax.to_ours(start, CONFIG)
  config = OptimizerConfig(1e-3, ScheduleSettings(warmup_steps=2))  # others: recipe
  optimizer = make_optimizer(config, params, total_steps=10)

  def step(params, opt):
    (loss, _), grads = jax.value_and_grad(total_loss, has_aux=True)(params, batch)
    updates, opt = optimizer.tx.update(grads, opt, params)
    return jax.tree.map(jnp.add, params, updates), opt, loss

  # XLA keeps 0.9 * mu in float32 by default; the golden run rounded it to bfloat16.
  step = jax.jit(step, compiler_options={"xla_allow_excess_precision": False})
  params = jax.tree.map(jnp.asarray, params)
  opt, losses = optimizer.tx.init(params), []
  for _ in range(5):
    params, opt, loss = step(params, opt)
    losses.append(float(loss))
  show("train5_losses", np.abs(losses / golden["train5_losses"] - 1).max())
  # The losses fall by 14%, so an error of 0.1% in a step would change them by 1e-4.
  np.testing.assert_allclose(losses, golden["train5_losses"], rtol=1e-5)

  after, expected = openvision_jax.to_theirs(params, CONFIG), under(golden, "param_after5/")
  moved = max(np.abs(start[name] - w).max() for name, w in expected.items())
  difference = {name: np.abs(after[name] - w).ravel() / moved for name, w in expected.items()}
  # Gradients of key biases are rounding errors, which Adam normalizes, so their steps are
  # arbitrary.
  biases = [difference.pop(name) for name in expected if name.endswith("key/bias")]
  show(f"key biases after 5 steps, of the largest move, {moved:.2g}", np.concatenate(biases).max())
  assert np.concatenate(biases).max() < 1
  rest = np.concatenate(list(difference.values()))
  show("the median of all other parameters", np.median(rest))
  show("99.99% of them", np.quantile(rest, 0.9999))
  show("all of them", rest.max())
  # Most differences are float32 rounding. If a first moment rounds to another bfloat16 value, its
  # step changes by 2^-8. Larger differences occur only where a gradient or a moment is near
  # zero.
  assert np.median(rest) < 1e-4
  assert np.quantile(rest, 0.9999) < 2**-8
  assert rest.max() < 0.05


def test_weight_decay_mask_and_schedule(golden):
  params = openvision_jax.to_ours(under(golden, "param/"), CONFIG)
  optimizer = make_optimizer(OptimizerConfig(1.0, ScheduleSettings(warmup_steps=2)), params, 10)
  decayed = {entry.theirs for entry in openvision_jax.name_map(CONFIG).entries
             if optimizer.groups[entry.ours[0]] == "decayed"}  # fmt: skip
  assert decayed == {name for name in under(golden, "param/") if name.endswith("/kernel")}
  ours = np.array([optimizer.learning_rate(step) for step in range(11)])
  # Two float32 formulas for a cosine between 0 and 1.
  show("schedule", np.abs(ours - golden["schedule_multiplier_steps_0_to_10"]).max())
  np.testing.assert_allclose(ours, golden["schedule_multiplier_steps_0_to_10"], atol=2e-7)


def test_the_released_checkpoint_loads(golden):
  """Load the orbax checkpoint of the released OpenVision code after these five steps."""
  folder = find_golden(_CHECKPOINT)
  with ocp.PyTreeCheckpointer() as checkpointer:
    stored = checkpointer.restore(folder)
  leaves = jax.tree_util.tree_leaves_with_path(stored["params"])
  flat = {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}
  params = openvision_jax.to_ours(flat, CONFIG)
  back = openvision_jax.to_theirs(params, CONFIG)
  expected = under(golden, "param_after5/")
  assert len(expected) > 80
  for name, tensor in expected.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)
  (loss, _), _ = gradient()(params, batch_of(golden))
  assert 0 < loss < golden["train5_losses"][-1]  # after one more update


def find_golden(name):
  places = [pathlib.Path(os.environ["OV_GOLDEN"])] if os.environ.get("OV_GOLDEN") else []
  places += [parent / "shared" / "golden" for parent in pathlib.Path(__file__).absolute().parents]
  for place in places:
    if (place / name).exists():
      return (place / name).resolve()
  pytest.skip(f"SKIPPED: {name} not found; set OV_GOLDEN to the folder that holds it")
