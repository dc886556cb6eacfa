"""Tests of the captioner: kept tokens, random keys and FLOPs."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import DecoderConfig, VisionLanguageConfig, ViTConfig, bind, flops_per_example
from ov_models.testing import random_params

CONFIG = VisionLanguageConfig(
  encoder=ViTConfig(width=24, depth=1, mlp_dim=8, num_heads=2, patch_size=4, image_size=24),
  decoder=DecoderConfig(
    width=32, depth=1, mlp_dim=64, num_heads=2, vocab_size=20, max_len=6, position="none"
  ),
  keep_ratio=0.35,
)
RELEASED = dataclasses.replace(
  CONFIG, keep_order="random", decoder=dataclasses.replace(CONFIG.decoder, mask="causal")
)


def inputs(batch=3):
  images = jax.random.normal(jax.random.key(5), (batch, 24, 24, 3))
  ids = jax.random.randint(jax.random.key(6), (batch, 6), 0, 20)
  return images, ids


@partial(jax.jit, static_argnums=0)
def forward(config, params, images, ids, key=None):
  return bind(config, params)(images, ids, key)


@partial(jax.jit, static_argnums=0)
def kept(config, params, images, key=None):
  return bind(config, params).encode(images, key)


def kept_index(config, key):
  """Return the indices [B, K] of the tokens that the decoder gets, found by their values."""
  out, tokens = kept(config, random_params(config), inputs()[0], key)
  same = (tokens[:, :, None] == out.tokens[:, None]).all(axis=-1)
  assert (same.sum(axis=-1) == 1).all()
  return np.asarray(same.argmax(axis=-1))


def test_training_keeps_a_random_sorted_subset():
  index = kept_index(CONFIG, jax.random.key(0))
  assert index.shape == (3, 12) == (3, CONFIG.num_kept)
  assert (np.diff(index, axis=1) > 0).all()
  assert not (index[0] == index[1]).all()
  assert not (index == kept_index(CONFIG, jax.random.key(1))).all()


def test_released_order_is_random():
  index = kept_index(RELEASED, jax.random.key(0))
  assert index.shape == (3, 12)
  assert (np.diff(index, axis=1) < 0).any(axis=1).all()


def test_evaluation_keeps_all_or_a_fixed_fraction():
  assert kept_index(RELEASED, None).shape == (3, 36)
  fixed = kept_index(dataclasses.replace(RELEASED, eval_keep="fixed"), None)
  assert fixed.shape == (3, 12)
  assert (fixed == fixed[0]).all()
  assert (np.diff(fixed, axis=1) > 0).all()


@pytest.mark.parametrize("ratio", [1e-9, 0.03, 1 / 3, 0.999, 1.0])
def test_any_keep_ratio(ratio):
  config = dataclasses.replace(CONFIG, keep_ratio=ratio)
  params, (images, ids) = random_params(config), inputs()
  _, tokens = jax.eval_shape(partial(kept, config), params, images, jax.random.key(0))
  assert tokens.shape[1] == config.num_kept == max(1, int(36 * ratio + 1e-6))
  out = jax.eval_shape(partial(forward, config), params, images, ids, jax.random.key(0))
  assert out.hidden.shape == (3, 6, 32)
  assert out.image.tokens.shape == (3, 36, 24)


def test_encoder_masking_and_keeping_compose():
  encoder = dataclasses.replace(CONFIG.encoder, mask_ratio=0.5, mask_mode="grid")
  config = dataclasses.replace(CONFIG, encoder=encoder)
  shapes = jax.eval_shape(
    partial(kept, config), random_params(config), inputs()[0], jax.random.key(0)
  )
  assert shapes[0].tokens.shape[1] == 18
  assert shapes[1].shape[1] == 6 == config.num_kept


def test_keys_are_explicit():
  params, (images, ids) = random_params(CONFIG), inputs()
  hidden = lambda key: forward(CONFIG, params, images, ids, key).hidden
  chex.assert_trees_all_equal(hidden(jax.random.key(1)), hidden(jax.random.key(1)))
  assert np.abs(hidden(jax.random.key(1)) - hidden(jax.random.key(2))).max() > 1e-4
  chex.assert_trees_all_equal(hidden(None), hidden(None))


def test_one_trace_over_several_steps():
  images, ids = inputs()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, images, ids, key):
    grads = jax.grad(lambda p: forward(CONFIG, p, images, ids, key).hidden.sum())(params)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

  params = random_params(CONFIG)
  for i in range(3):
    params = step(params, images + i, (ids + i) % 20, jax.random.key(i))


def test_unused_outputs_get_no_gradient():
  # As published: the pooled vector is not used for captions, so its norm gets no gradient.
  params, (images, ids) = random_params(CONFIG), inputs()
  grads = jax.grad(lambda p: (forward(CONFIG, p, images, ids).hidden ** 2).sum())(params)
  assert not grads["encoder"]["norm"]["scale"].any()
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # The loss here is on the hidden states, before the head.
    if not name.startswith(("encoder/norm", "decoder/head")):
      assert leaf.any(), name


def test_logits_are_float32_matmuls_with_the_head():
  params, (images, ids) = random_params(CONFIG), inputs()
  model = bind(CONFIG, params)
  hidden = forward(CONFIG, params, images, ids).hidden
  logits = model.logits(hidden)
  assert logits.dtype == jnp.float32
  assert model.head_kernel.shape == (32, 20)
  np.testing.assert_allclose(logits, hidden @ params["decoder"]["head"]["kernel"], rtol=1e-5)


def test_flops_against_the_compiler():
  """XLA counts a multiply-add as two operations, too, and all layers if unrolled."""
  config = VisionLanguageConfig(
    encoder=dataclasses.replace(CONFIG.encoder, width=64, mlp_dim=256, depth=2, scan=False),
    decoder=dataclasses.replace(CONFIG.decoder, width=64, mlp_dim=256, depth=2, scan=False),
    keep_ratio=0.5,
  )
  params, (images, ids) = random_params(config), inputs(1)

  def loss(params):
    model = bind(config, params)
    logits = model.logits(model(images, ids, jax.random.key(0)).hidden)
    return (logits**2).mean()

  cost = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()
  # XLA also counts norms, softmax, GELU and embedding updates, and does not count the
  # gradient with respect to the pixels.
  assert flops_per_example(config) == pytest.approx(cost["flops"], rel=0.15)


def test_flops_of_a_published_size():
  config = VisionLanguageConfig.openvision2("L/14", "L", image_size=224)
  # Forward by hand: 24 layers x 257 tokens x 12 D^2 x 2, scores, patches; then the decoder.
  encoder = 24 * (257 * 2 * 12 * 1024**2 + 4 * 257**2 * 1024) + 2 * 256 * 588 * 1024
  tokens = 89 + 127
  decoder = 12 * (tokens * 2 * 12 * 768**2 + 4 * tokens**2 * 768)
  ends = 2 * 89 * 1024 * 768 + 2 * 127 * 768 * 32000
  assert flops_per_example(config) == 3 * (encoder + decoder + ends)
  cheaper = dataclasses.replace(config, keep_ratio=0.1)
  assert flops_per_example(cheaper) < flops_per_example(config)
