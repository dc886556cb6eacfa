"""Our models against the predecessors' arithmetic, through the name map.

The stored arrays come from small random models run in float32 with exact matmuls. Two float32
programs that sum in another order differ by a few units of 6e-8 relative to the largest entry;
1e-5 (values) and 1e-4 (gradients) leave room for other backends and still catch a wrong formula.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_convert import openvision_jax
import ov_models

GOLDEN = pathlib.Path(__file__).parents[3] / "tests" / "golden"


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def first():
  return dict(np.load(GOLDEN / "openvision1.npz"))


@pytest.fixture(scope="module")
def second():
  return dict(np.load(GOLDEN / "openvision2_decoder.npz"))


@pytest.fixture(scope="module")
def config():
  """The small model of the golden files, see tests/golden/dims.json."""
  return ov_models.VisionLanguageConfig(
    encoder=ov_models.ViTConfig(
      width=64, depth=2, mlp_dim=128, num_heads=2, patch_size=8, image_size=32
    ),
    decoder=ov_models.DecoderConfig(
      width=40, depth=2, mlp_dim=80, num_heads=2, vocab_size=128, max_len=19,
      mask="causal", position="none",
    ),
    keep_order="random",
  )  # fmt: skip


def under(arrays, prefix):
  return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def captioner_params(first, second, config):
  towers = {f"img_encoder/{n}": a for n, a in under(first, "param/img/").items()}
  towers |= {f"txt_decoder/{n}": a for n, a in under(second, "param/").items()}
  return openvision_jax.to_ours(towers, config, ignore=["img_encoder/head/kernel"])


def assert_close(name, ours, golden, tolerance):
  """Largest difference, relative to the largest entry of the golden array."""
  assert ours.shape == golden.shape, name
  difference = np.abs(np.asarray(ours) - golden).max() / np.abs(golden).max()
  print(f"{name}: {difference:.1e}")
  assert difference <= tolerance, f"{name} differs by {difference:.1e} relative"


def test_vision_tower(first, config):
  tower = {n: a for n, a in under(first, "param/").items() if n.startswith("img/")}
  params = openvision_jax.to_ours(tower, config.encoder, ignore=["img/head/kernel"])
  out = jax.jit(lambda p, x: ov_models.bind(config.encoder, p)(x))(
    params, first["image_normalised"]
  )
  assert_close("image_tokens", out.tokens, first["image_tokens"], 1e-5)
  assert_close("image_pooled_before_head", out.pooled, first["image_pooled_before_head"], 1e-5)
  projected = out.pooled @ first["param/img/head/kernel"]
  assert_close("image_projected_raw", projected, first["image_projected_raw"], 1e-5)
  norm = jnp.linalg.norm(projected, axis=1, keepdims=True)
  assert_close("zimg", projected / (norm + 1e-8), first["zimg"], 1e-5)


def caption_loss(params, context, labels, config):
  """Their loss: cross-entropy of the next token where it is not padding, weight 2."""
  model = ov_models.bind(config, params)
  logits = model.logits(model.decoder(context, labels[:, :-1]))
  targets = labels[:, 1:]
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=2)[..., 0]
  mask = targets != 0
  loss = (nll * mask).sum() / (mask.sum() + 1e-8)
  return 2 * loss, (loss, logits)


def test_openvision2_decoder_values_and_gradients(first, second, config):
  params = captioner_params(first, second, config)
  step = jax.jit(
    lambda p, c: jax.value_and_grad(caption_loss, argnums=(0, 1), has_aux=True)(
      p, c, second["labels"], config
    )
  )
  (total, (loss, logits)), (grads, grad_context) = step(params, second["context"])
  assert_close("logits", logits, second["logits"], 1e-5)
  assert_close("caption_loss", loss, second["caption_loss"], 1e-5)
  assert_close("total_loss", total, second["total_loss"], 1e-5)
  assert_close("grad_context", grad_context, second["grad_context"], 1e-4)
  theirs = openvision_jax.to_theirs(grads, config)
  golden = under(second, "grad/")
  assert set(golden) == set(under(theirs, "txt_decoder/"))
  for name, gradient in golden.items():
    if name.endswith("key/bias"):
      # Zero in exact arithmetic (a constant added to all keys leaves the softmax as it is), so
      # both sides are rounding errors: compare them with the gradient of the query bias.
      scale = np.abs(golden[name.replace("key/bias", "query/bias")]).max()
      difference = np.abs(theirs[f"txt_decoder/{name}"] - gradient).max() / scale
      print(f"grad/{name}: {difference:.1e} of the query bias gradient")
      assert difference <= 1e-4
    else:
      assert_close(f"grad/{name}", theirs[f"txt_decoder/{name}"], gradient, 1e-4)


def test_a_wrong_formula_is_caught(first, second, config):
  # The comparison must be able to fail: the mask of our default is not theirs.
  params = captioner_params(first, second, config)
  prefix = ov_models.VisionLanguageConfig(
    encoder=config.encoder,
    decoder=ov_models.DecoderConfig(
      width=40, depth=2, mlp_dim=80, num_heads=2, vocab_size=128, max_len=19,
      mask="prefix", position="none",
    ),
  )  # fmt: skip
  _, (_, logits) = caption_loss(params, second["context"], second["labels"], prefix)
  assert np.abs(logits - second["logits"]).max() > 1e-3
