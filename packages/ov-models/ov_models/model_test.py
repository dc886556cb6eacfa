"""Tests of the vision-language model: published sizes, embeddings, missing parts and FLOPs.

//tests/golden:openvision1_model_test compares the numbers with the released OpenVision code.
"""

import dataclasses
from functools import partial
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import (
  EMBED_DIMS,
  DecoderConfig,
  QueryDecoderConfig,
  TextConfig,
  VisionLanguageConfig,
  ViTConfig,
  abstract_params,
  bind,
  flops_per_example,
  generate,
  init,
  num_params,
)
from ov_models.testing import random_params

B, T, Q, V, E = 3, 6, 5, 30, 20
SIZES = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}
IMAGE = ViTConfig(width=24, depth=1, mlp_dim=48, num_heads=2, patch_size=8, image_size=16)
TEXT = TextConfig(width=16, depth=1, mlp_dim=32, num_heads=2, vocab_size=V, max_len=T)
QUERIES = QueryDecoderConfig(vocab_size=V, num_queries=Q, **SIZES)
FORCED = DecoderConfig(vocab_size=V, max_len=Q, **SIZES)
MODEL = VisionLanguageConfig(encoder=IMAGE, text=TEXT, decoder=QUERIES, embed_dim=E)


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def inputs(batch=B):
  images = jax.random.normal(jax.random.key(5), (batch, 16, 16, 3))
  texts = jax.random.randint(jax.random.key(6), (batch, T), 0, V)
  return images, texts, jax.random.randint(jax.random.key(7), (batch, Q), 0, V)


def forward(config, params, images, texts, captions, key=None):
  """Return both embeddings and the hidden states of the captions; None for missing parts."""
  return _forward(config, params, images, texts, captions, key)


@partial(jax.jit, static_argnums=0)
def _forward(config, params, images, texts, captions, key):
  model = bind(config, params)
  image = model.encode_image(images, key)
  text = None if config.text is None else model.encode_text(texts)
  if config.decoder is None:
    return image, text, None
  beside = None if text is None else text.tokens
  hidden = model.caption_hidden(image.tokens, text_tokens=beside, ids=captions, key=key)
  return image, text, hidden


def run(config):
  return forward(config, random_params(config), *inputs())


# Image tower with its head + text tower with its head + decoder + the temperature, as published.
PUBLISHED = {
  ("Ti/16", "Ti"): 5_523_264 + 11_534_976 + 11_581_056 + 1,
  ("Ti/8", "Ti"): 5_412_672 + 11_534_976 + 11_581_056 + 1,
  ("S/16", "S"): 21_737_088 + 33_760_512 + 33_926_400 + 1,
  ("S/8", "S"): 21_515_904 + 33_760_512 + 33_926_400 + 1,
  ("B/16", "B"): 86_039_808 + 54_516_736 + 54_934_528 + 1,
  ("B/8", "B"): 85_597_440 + 54_516_736 + 54_934_528 + 1,
  ("L/14", "L"): 303_700_992 + 110_283_264 + 111_106_560 + 1,
  ("L/8", "L"): 303_295_488 + 110_283_264 + 111_106_560 + 1,
  ("So400m/14", "So400m"): 413_474_544 + 449_752_176 + 451_134_576 + 1,
  ("H/14", "H"): 631_745_280 + 336_209_920 + 337_569_792 + 1,
}


@pytest.mark.parametrize(("image", "text"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(image, text):
  config = VisionLanguageConfig.from_names(image, text, text, preset="openvision_released")
  assert num_params(config) == PUBLISHED[image, text]
  biased = dataclasses.replace(config, bias_init=-10.0)
  assert num_params(biased) == PUBLISHED[image, text] + 1


@pytest.mark.parametrize(
  ("image", "embed_dim"),
  [
    ("Ti/16", 192), ("S/8", 384), ("B/16", 512), ("L/14", 768), ("So400m/14", 1152), ("H/14", 1024),
    ("g/14", 1024), ("M/16", 512), ("G/14", 1664), ("mu/16", 32),
  ],
)  # fmt: skip
def test_embed_dim_follows_the_image_variant(image, embed_dim):
  # The published sizes; otherwise the width of the tower.
  config = VisionLanguageConfig.from_names(image, "Ti", None)
  assert config.embed_dim == embed_dim
  assert EMBED_DIMS.get(image.split("/")[0], config.encoder.width) == embed_dim
  heads = abstract_params(config)
  assert heads["image_head"]["kernel"].shape == (config.encoder.width, embed_dim)
  assert heads["text_head"]["kernel"].shape == (192, embed_dim)
  assert VisionLanguageConfig.from_names(image, "Ti", None, embed_dim=64).embed_dim == 64


def test_presets_and_options_reach_their_parts():
  make = partial(VisionLanguageConfig.from_names, "S/16", "S", "Ti")
  ours, released, clip = (make(preset=p) for p in ("default", "openvision_released", "clip"))
  assert make() == ours
  assert (ours.text.padding, released.text.padding) == ("mask", "attend")
  assert (clip.text.mask, clip.text.pool) == ("causal", "argmax")
  assert dataclasses.replace(ours, text=released.text) == released
  assert (released.text.max_len, released.decoder.num_queries) == (80, 128)
  config = make(
    image_size=160, vocab_size=99, text_len=20, caption_len=30, decoder_kind="teacher_forced",
    parallel_ratio=0.75, dtype="bfloat16", remat="full", encoder_options={"mask_ratio": 0.5},
    text_options={"pool": "mean", "dtype": "float32"}, decoder_options={"depth": 2},
  )  # fmt: skip
  parts = (config.encoder, config.text, config.decoder)
  assert [p.dtype for p in parts] == ["bfloat16", "float32", "bfloat16"]
  assert [p.remat for p in parts] == ["full"] * 3
  assert (config.encoder.image_size, config.encoder.mask_ratio) == (160, 0.5)
  assert (config.text.vocab_size, config.text.max_len, config.text.pool) == (99, 20, "mean")
  assert isinstance(config.decoder, DecoderConfig)
  assert (config.decoder.vocab_size, config.decoder.max_len, config.decoder.depth) == (99, 30, 2)
  assert config.decoder.parallel and not make(decoder_kind="teacher_forced").decoder.parallel


def test_initial_temperature_bias_and_heads():
  np.testing.assert_allclose(MODEL.log_scale_init, 2.65926, atol=1e-5)  # ln(1 / 0.07), published
  assert "bias" not in abstract_params(MODEL)
  config = dataclasses.replace(
    MODEL, decoder=None, embed_dim=600, log_scale_init=math.log(10), bias_init=-10.0
  )
  params = init(config, jax.random.key(0))
  assert params["log_scale"].shape == params["bias"].shape == ()
  np.testing.assert_allclose(params["log_scale"], math.log(10), rtol=1e-6)
  np.testing.assert_array_equal(params["bias"], -10.0)
  # At least 9,600 samples: the standard error is below 1%.
  np.testing.assert_allclose(np.std(params["image_head"]["kernel"]), 0.02, rtol=0.04)
  np.testing.assert_allclose(np.std(params["text_head"]["kernel"]), 16**-0.5, rtol=0.04)


def test_embeddings_are_projected_and_of_unit_length():
  params = random_params(MODEL)
  image, text, hidden = run(MODEL)
  for out, head in ((image, "image_head"), (text, "text_head")):
    np.testing.assert_allclose(out.raw, out.pooled @ params[head]["kernel"], atol=1e-5)
    norm = np.linalg.norm(out.raw, axis=1, keepdims=True)
    # float32, 20 squares.
    np.testing.assert_allclose(out.unit, out.raw / norm, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(out.unit, axis=1), 1, atol=1e-6)
    assert out.unit.shape == (B, E)
  assert image.tokens.shape == (B, 4, 24)
  assert text.tokens.shape == (B, T - 1, 16)  # without [CLS]
  assert hidden.shape == (B, Q, 32)


def test_zero_vector_has_a_finite_embedding():
  params = random_params(MODEL)
  params["image_head"]["kernel"] *= 0
  image, _, _ = forward(MODEL, params, *inputs())
  np.testing.assert_array_equal(image.unit, 0)


def test_embeddings_are_float32_also_under_bfloat16():
  low = dataclasses.replace(
    MODEL, **{n: dataclasses.replace(getattr(MODEL, n), dtype="bfloat16")
              for n in ("encoder", "text", "decoder")},
  )  # fmt: skip
  for out, exact in zip(run(low)[:2], run(MODEL)[:2], strict=True):
    assert out.unit.dtype == out.raw.dtype == jnp.float32
    assert out.tokens.dtype == jnp.bfloat16
    # bfloat16 rounding in one block: a few percent of entries of size 20^-0.5.
    assert 0 < np.abs(out.unit - exact.unit).max() < 0.03
  assert run(low)[2].dtype == jnp.float32


def test_queries_read_image_and_text():
  params, (images, texts, captions) = random_params(MODEL), inputs()
  hidden = lambda images, texts, captions: forward(MODEL, params, images, texts, captions)[2]
  before = hidden(images, texts, captions)
  assert np.abs(hidden(-images, texts, captions) - before).max() > 1e-4
  assert np.abs(hidden(images, (texts + 1) % V, captions) - before).max() > 1e-4
  np.testing.assert_array_equal(hidden(images, texts, (captions + 1) % V), before)


def test_teacher_forced_decoder_reads_image_and_caption():
  config = dataclasses.replace(MODEL, decoder=FORCED)
  params, (images, texts, captions) = random_params(config), inputs()
  hidden = lambda images, texts, captions: forward(config, params, images, texts, captions)[2]
  before = hidden(images, texts, captions)
  assert np.abs(hidden(-images, texts, captions) - before).max() > 1e-4
  np.testing.assert_array_equal(hidden(images, (texts + 1) % V, captions), before)
  after = hidden(images, texts, captions.at[:, 2].add(1) % V)
  changed = np.abs(after - before).max(axis=(0, 2)) > 1e-6
  np.testing.assert_array_equal(changed, np.arange(Q) >= 2)
  model = bind(config, params)
  np.testing.assert_array_equal(model.head_kernel, params["decoder"]["head"]["kernel"])
  # Generation works with the same tokens.
  out = generate(model, images, max_len=Q, bos_id=1, eos_id=2, pad_id=0)
  ids = jnp.concatenate([jnp.ones((B, 1), jnp.int32), out.ids[:, :-1]], axis=1)
  logits = hidden(images, texts, ids) @ model.head_kernel
  written = np.arange(Q) < np.asarray(out.length)[:, None]
  np.testing.assert_array_equal(logits.argmax(-1)[written], out.ids[written])


def test_fraction_of_parallel_captions():
  config = dataclasses.replace(
    MODEL, decoder=dataclasses.replace(FORCED, parallel=True), parallel_ratio=0.75
  )
  params, (images, texts, captions) = random_params(config), inputs(256)
  hidden = lambda captions, key=None: forward(config, params, images, texts, captions, key)[2]
  changed = np.abs(hidden(captions, jax.random.key(0)) - hidden(captions)).max(axis=(1, 2)) > 1e-6
  # 256 samples: the standard deviation is 0.027.
  assert abs(changed.mean() - 0.75) < 0.11
  # Parallel rows do not attend to their caption; the others attend to earlier tokens.
  other = np.abs(
    hidden((captions + 1) % V, jax.random.key(0)) - hidden(captions, jax.random.key(0))
  ).max(axis=(1, 2))
  np.testing.assert_array_equal(other == 0, changed)
  again = np.abs(hidden(captions, jax.random.key(1)) - hidden(captions)).max(axis=(1, 2)) > 1e-6
  assert (again != changed).any()


@pytest.mark.parametrize("decoder", [QUERIES, FORCED], ids=["queries", "forced"])
def test_without_text_there_is_no_head(decoder):
  config = dataclasses.replace(MODEL, text=None, decoder=decoder, embed_dim=24)
  params = random_params(config)
  assert params.keys() == {"encoder", "decoder"}
  assert "text_proj" not in params["decoder"]
  image, _, hidden = run(config)
  np.testing.assert_array_equal(image.raw, image.pooled)
  np.testing.assert_allclose(np.linalg.norm(image.unit, axis=1), 1, atol=1e-6)
  assert hidden.shape == (B, Q, 32)
  with pytest.raises(ValueError, match="no text tower; build it with a TextConfig as `text`"):
    bind(config, params).encode_text(inputs()[1])
  named = VisionLanguageConfig.from_names("S/16", None, "Ti", embed_dim=7)
  assert (named.text, named.embed_dim) == (None, 384)


def test_without_decoder_there_is_no_caption():
  config = dataclasses.replace(MODEL, decoder=None)
  params = random_params(config)
  assert params.keys() == {"encoder", "text", "image_head", "text_head", "log_scale"}
  model = bind(config, params)
  with pytest.raises(ValueError, match="no decoder; build it with a config as `decoder`"):
    model.caption_hidden(jnp.zeros((B, 4, 24)))
  with pytest.raises(ValueError, match="no decoder; build it"):
    _ = model.head_kernel
  # The towers equal those of the model with a decoder.
  shared = {name: random_params(MODEL)[name] for name in params}
  for a, b in zip(forward(config, shared, *inputs())[:2], run(MODEL)[:2], strict=True):
    chex.assert_trees_all_close(a, b, atol=1e-6)


def test_missing_inputs():
  with pytest.raises(ValueError, match=r"text_tokens=None.*pass text_tokens \[B, T, 16\]"):
    bind(MODEL, random_params(MODEL)).caption_hidden(jnp.zeros((B, 4, 24)))
  config = dataclasses.replace(MODEL, decoder=FORCED)
  with pytest.raises(ValueError, match="ids=None, but a DecoderConfig reads the caption"):
    bind(config, random_params(config)).caption_hidden(jnp.zeros((B, 4, 24)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"embed_dim": 0}, "embed_dim=0 must be a positive integer"),
    ({"text": None, "decoder": None}, "leave only an image tower; use a ViTConfig"),
    ({"text": None}, "embed_dim=20 without a text tower.*set embed_dim=24"),
    ({"text": None, "embed_dim": 24, "bias_init": -10.0}, "no similarities to add it to"),
    ({"parallel_ratio": 1.0}, r"parallel_ratio=1.0 is out of range; give a fraction in \[0, 1\)"),
    ({"parallel_ratio": 0.5}, "needs a teacher-forced decoder with parallel=True"),
    ({"parallel_ratio": 0.5, "decoder": FORCED}, "needs a teacher-forced decoder with parallel"),
  ],
)
def test_invalid_configs(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MODEL, **fields)


def test_invalid_names():
  with pytest.raises(ValueError, match="embed_dim=0 must be a positive integer"):
    VisionLanguageConfig.from_names("Ti/16", "Ti", "Ti", embed_dim=0)
  with pytest.raises(ValueError, match="decoder_kind='query' is unknown.*nearest: queries"):
    VisionLanguageConfig.from_names("Ti/16", "Ti", "Ti", decoder_kind="query")
  with pytest.raises(ValueError, match="decoder variant='XL' is unknown"):
    VisionLanguageConfig.from_names("Ti/16", "Ti", "XL")


def test_one_trace_over_several_steps_and_every_parameter_learns():
  config = dataclasses.replace(MODEL, encoder=dataclasses.replace(IMAGE, mask_ratio=0.5))

  def loss(params, images, texts, captions, key):
    image, text, hidden = forward(config, params, images, texts, captions, key)
    scores = jnp.exp(params["log_scale"]) * image.unit @ text.unit.T
    contrast = -jnp.diagonal(jax.nn.log_softmax(scores)).mean()
    return contrast + ((hidden @ params["decoder"]["head"]["kernel"]) ** 2).mean()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, *batch):
    return jax.grad(loss)(params, *batch)

  images, texts, captions = inputs()
  for i in range(3):
    grads = step(random_params(config), images + i, (texts + i) % V, captions, jax.random.key(i))
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert leaf.any(), jax.tree_util.keystr(path)


def test_flops_of_a_published_size():
  """Compare with a manual count: 12 D^2 weights per block, backward twice the forward."""
  blocks = lambda depth, t, d: depth * (2 * t * 12 * d**2 + 4 * t**2 * d)
  encoder = 2 * 256 * 588 * 1024 + blocks(24, 257, 1024)
  texts = 2 * blocks(12, 80, 768)
  heads = 2 * 768 * (1024 + 2 * 768)
  tokens = 256 + 79 + 128
  queries = 2 * 256 * 1024 * 768 + 2 * 79 * 768**2 + blocks(12, tokens, 768) + 2 * 128 * 768 * 32000
  config = VisionLanguageConfig.from_names("L/14", "L", "L")
  assert flops_per_example(config) == 3 * (encoder + texts + heads + queries)
  one = 3 * (blocks(12, 80, 768) + 2 * 768 * 768)
  assert flops_per_example(config, num_texts=1) == flops_per_example(config) - one
  clip = dataclasses.replace(config, decoder=None)
  assert flops_per_example(clip) == 3 * (encoder + texts + heads)
  # Teacher-forced: image and caption, no other text.
  forced = 2 * 256 * 1024 * 768 + blocks(12, 256 + 127, 768) + 2 * 127 * 768 * 32000
  cap = VisionLanguageConfig.from_names(
    "L/14", None, "L", decoder_kind="teacher_forced", caption_len=127
  )
  assert flops_per_example(cap) == 3 * (encoder + forced)


@pytest.mark.parametrize("decoder", [QUERIES, FORCED], ids=["queries", "forced"])
def test_flops_against_the_compiler(decoder):
  """XLA counts a multiply-add as two operations, too, and all layers if unrolled."""
  wide = {"width": 64, "mlp_dim": 256, "scan": False}
  config = VisionLanguageConfig(
    encoder=dataclasses.replace(IMAGE, **wide),
    text=dataclasses.replace(TEXT, **wide),
    decoder=dataclasses.replace(decoder, **wide),
    embed_dim=E,
  )

  def loss(params):
    image, text, hidden = forward(config, params, *inputs(1))
    logits = hidden @ params["decoder"]["head"]["kernel"]
    return (logits**2).mean() + (image.raw * text.raw).mean()

  cost = jax.jit(jax.grad(loss)).lower(random_params(config)).compile().cost_analysis()
  # The compiler also counts norms, softmax, GELU and the update of embeddings, and leaves out the
  # gradient with respect to the pixels.
  assert flops_per_example(config, num_texts=1) == pytest.approx(cost["flops"], rel=0.15)
