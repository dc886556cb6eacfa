"""Tests of the caption decoder: attention masks, sizes and the cached step."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ov_models import (
  DecoderConfig,
  VisionLanguageConfig,
  ViTConfig,
  abstract_params,
  bind,
  num_params,
)
from ov_models.testing import random_params

K, T, V = 5, 7, 30


def captioner(mask="prefix", position="learned", **options):
  return VisionLanguageConfig(
    encoder=ViTConfig(width=24, depth=1, mlp_dim=8, num_heads=2, patch_size=8, image_size=16),
    decoder=DecoderConfig(
      width=32, depth=2, mlp_dim=64, num_heads=2, vocab_size=V, max_len=T,
      mask=mask, position=position, **options,
    ),
  )  # fmt: skip


class Jitted:
  """Decoder of a captioner with jitted methods."""

  def __init__(self, config, edit=lambda params: params):
    params = random_params(config)
    edit(params["decoder"])
    decoder = lambda params: bind(config, params).decoder
    self.call = partial(jax.jit(lambda p, *args: decoder(p)(*args)), params)
    prefill = jax.jit(lambda p, *args: decoder(p).prefill(*args), static_argnums=2)
    self.prefill = partial(prefill, params)
    self.step = partial(jax.jit(lambda p, *args: decoder(p).step(*args)), params)


@pytest.fixture(scope="module")
def built():
  """Return jitted decoders by (mask, position)."""
  return functools.cache(lambda *options: Jitted(captioner(*options)))


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def inputs(batch=2):
  context = jax.random.normal(jax.random.key(5), (batch, K, 24))
  ids = jax.random.randint(jax.random.key(6), (batch, T), 0, V)
  return context, ids


# Compared with the published captioner of the first OpenVision, which has 128 learned queries and
# a projection of text tokens of another width instead of an embedding.
FIRST = {
  ("Ti/16", "Ti"): 11_581_056,
  ("S/16", "S"): 33_926_400,
  ("B/16", "B"): 54_934_528,
  ("L/14", "L"): 111_106_560,
  ("So400m/14", "So400m"): 451_134_576,
  ("H/14", "H"): 337_569_792,
}


@pytest.mark.parametrize(("image", "text"), FIRST)
def test_parameter_counts_are_the_published_ones(image, text):
  config = VisionLanguageConfig.openvision2(image, text, preset="openvision2_released")
  d = config.decoder.width
  expected = FIRST[image, text] - 128 * d - d * d + 32_000 * d
  assert num_params(abstract_params(config)["decoder"]) == expected
  if text == "Ti":
    assert expected == 17_663_616
    assert num_params(config) == 23_150_016


@pytest.mark.parametrize("name", ["M", "g", "G", "e"])
def test_other_variants_build(name):
  config = VisionLanguageConfig.openvision2("g/14", name, decoder_options={"position": "none"})
  d, f = config.decoder.width, config.decoder.mlp_dim
  block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
  ends = 2 * 32_000 * d + 1408 * d + 2 * d
  assert num_params(abstract_params(config)["decoder"]) == config.decoder.depth * block + ends


@pytest.mark.parametrize("mask", ["prefix", "causal"])
@pytest.mark.parametrize("position", ["none", "learned", "sincos"])
def test_text_is_causal(built, mask, position):
  decoder = built(mask, position)
  context, ids = inputs()
  before = decoder.call(context, ids)
  for at in range(T):
    after = decoder.call(context, ids.at[:, at].add(1) % V)
    changed = np.abs(after - before).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(changed, np.arange(T) >= at)


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_text_attends_to_every_image_token(built, mask):
  decoder = built(mask, "learned")
  context, ids = inputs()
  before = decoder.call(context, ids)
  for k in range(K):
    after = decoder.call(context.at[:, k].add(1.0), ids)
    assert (np.abs(after - before).max(axis=2) > 1e-5).all()


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_image_tokens_follow_the_mask(built, mask):
  # The keys of the last layer depend on one layer of attention.
  keys = lambda context: built(mask, "learned").prefill(context, 1).keys[-1, :, :K]
  context, _ = inputs()
  before = keys(context)
  for k in range(K):
    changed = np.abs(keys(context.at[:, k].add(1.0)) - before).max((0, 2, 3))
    expected = np.arange(K) >= k if mask == "causal" else np.ones(K, bool)
    np.testing.assert_array_equal(changed > 1e-6, expected)


def test_order_of_image_tokens_matters_only_under_the_causal_mask(built):
  context, ids = inputs()
  permuted = context[:, ::-1]
  prefix, causal = built("prefix", "learned").call, built("causal", "learned").call
  np.testing.assert_allclose(prefix(context, ids), prefix(permuted, ids), atol=1e-5)
  assert np.abs(causal(context, ids) - causal(permuted, ids)).max() > 1e-3


@pytest.mark.parametrize(
  ("position", "sees"), [("none", False), ("learned", True), ("sincos", True)]
)
def test_positions_distinguish_repeated_words(position, sees):
  # All tokens are equal: without positions, attention averages equal values, so all positions
  # have the same state.
  def blank(params):
    params["image_proj"]["kernel"] *= 0
    params["embed"]["embedding"] *= 0

  decoder = Jitted(captioner("prefix", position), blank)
  hidden = decoder.call(jnp.zeros((1, K, 24)), jnp.full((1, T), 3))
  assert (np.abs(hidden[0, 0] - hidden[0, -1]).max() > 1e-4) == sees


@pytest.mark.parametrize(
  ("mask", "position", "scan"),
  [
    ("prefix", "learned", True),
    ("prefix", "sincos", False),
    ("causal", "none", True),
    ("causal", "learned", False),
  ],
)
def test_cached_steps_equal_the_full_forward(mask, position, scan):
  # The image cache is computed without the text, so images do not attend to the text.
  decoder = Jitted(captioner(mask, position, scan=scan))
  context, ids = inputs()
  whole = decoder.call(context, ids)
  cache = decoder.prefill(context, T)
  for t in range(T):
    hidden, cache = decoder.step(ids[:, t], jnp.int32(t), cache)
    # Different order of float32 sums in two blocks; hidden states have unit scale.
    np.testing.assert_allclose(hidden, whole[:, t], atol=1e-5)


def test_hidden_is_float32_also_under_bfloat16(built):
  context, ids = inputs()
  exact = built("prefix", "learned").call(context, ids)
  low = Jitted(captioner(dtype="bfloat16")).call(context, ids)
  assert low.dtype == jnp.float32
  # Hidden states have unit scale; bfloat16 rounding in two blocks gives errors of a few percent.
  assert np.abs(low - exact).max() < 0.1
  assert np.abs(low - exact).mean() < 0.02


def test_too_long_text(built, monkeypatch):
  # Disable the jaxtyping checks, as in production.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  context, ids = inputs()
  long = jnp.concatenate([ids, ids], axis=1)
  with pytest.raises(ValueError, match=r"text of 14 tokens exceeds max_len=7.*position='sincos'"):
    built("prefix", "learned").call(context, long)
  assert built("prefix", "sincos").call(context, long).shape == (2, 14, 32)
  with pytest.raises(ValueError, match=r"ids have shape \(7,\); expected \[B, T\]"):
    built("prefix", "learned").call(context, ids[0])
