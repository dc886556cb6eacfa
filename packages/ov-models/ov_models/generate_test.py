"""Tests of generation against references without a cache."""

import dataclasses
import itertools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import (
  DecoderConfig,
  QueryDecoder,
  QueryDecoderConfig,
  VisionLanguageConfig,
  ViTConfig,
  bind,
  generate,
)
from ov_models.generate import _generate
from ov_models.testing import random_params

BOS, EOS, PAD, V, T = 1, 2, 0, 12, 8
IDS = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}


def model(mask="prefix", position="learned", vocab=V, **options):
  config = VisionLanguageConfig(
    encoder=ViTConfig(width=24, depth=1, mlp_dim=8, num_heads=2, patch_size=8, image_size=16),
    decoder=DecoderConfig(
      width=32, depth=2, mlp_dim=32, num_heads=2, vocab_size=vocab, max_len=T,
      mask=mask, position=position, **options,
    ),
  )  # fmt: skip
  params = random_params(config, seed=3)
  # Scaled so that captions depend on words, image and order, and some end early.
  decoder = params["decoder"]
  decoder["embed"]["embedding"] *= 10
  decoder["image_proj"]["kernel"] *= 20
  decoder["head"]["kernel"] *= 2
  for name in ("query", "key", "value", "out"):
    decoder["blocks"]["attn"][name]["kernel"] *= 3
  return bind(config, params)


def images(batch=6):
  return jax.random.normal(jax.random.key(9), (batch, 16, 16, 3))


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


class Reference:
  """Computes log p(next | image, text so far) without a cache."""

  def __init__(self, captioner, pictures):
    self.tokens = captioner.encode(pictures)[1]
    self.log_probs = jax.jit(
      lambda ids: jax.nn.log_softmax(captioner.decoder.logits(captioner.decoder(self.tokens, ids)))
    )

  def next(self, written):
    """Return [B, V] log-probabilities after the tokens written [B, t]."""
    batch = self.tokens.shape[0]
    ids = np.full((batch, T), PAD, np.int32)
    ids[:, 0] = BOS
    ids[:, 1 : 1 + written.shape[1]] = written[:, : T - 1]
    return np.asarray(self.log_probs(ids))[:, written.shape[1]]


@pytest.mark.parametrize(("mask", "position"), [("prefix", "learned"), ("causal", "none")])
def test_greedy_equals_the_uncached_decoder(mask, position):
  captioner = model(mask, position)
  out = generate(captioner, images(), max_len=T, **IDS)
  reference = Reference(captioner, images())
  written = np.zeros((6, 0), np.int32)
  total, done = np.zeros(6), np.zeros(6, bool)
  for _ in range(T):
    log_prob = reference.next(written)
    token = np.where(done, PAD, log_prob.argmax(axis=1))
    total += np.where(done, 0, log_prob.max(axis=1))
    done |= token == EOS
    written = np.concatenate([written, token[:, None].astype(np.int32)], axis=1)
  np.testing.assert_array_equal(out.ids, written)
  np.testing.assert_allclose(out.log_prob, total, atol=1e-4)
  assert len({tuple(row) for row in written}) > 1  # captions depend on the images


def test_stops_at_the_end_token():
  out = generate(model(), images(32), max_len=T, **IDS)
  ids, length = np.asarray(out.ids), np.asarray(out.length)
  ended = (ids == EOS).any(axis=1)
  assert ended.any(), "the test needs a caption that ends"
  for row, n, end in zip(ids, length, ended):
    assert (row[n:] == PAD).all()
    assert n == (list(row).index(EOS) + 1 if end else T)


def test_loop_ends_early_when_all_have_ended():
  captioner = model()
  captioner.decoder.head.kernel[...] = jnp.zeros(
    (32, V)
  )  # equal logits: argmax is token 0, the end token
  out = generate(captioner, images(), max_len=T, bos_id=BOS, eos_id=0, pad_id=5)
  np.testing.assert_array_equal(out.ids[:, 0], 0)
  np.testing.assert_array_equal(out.ids[:, 1:], 5)
  np.testing.assert_array_equal(out.length, 1)
  np.testing.assert_allclose(out.log_prob, -np.log(V), rtol=1e-5)


def test_one_beam_is_greedy():
  captioner = model()
  greedy = generate(captioner, images(), max_len=T, **IDS)
  beam = generate(captioner, images(), max_len=T, method="beam", num_beams=1, **IDS)
  np.testing.assert_array_equal(beam.ids, greedy.ids)
  np.testing.assert_allclose(beam.log_prob, greedy.log_prob, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beam_finds_the_best_of_all_captions(penalty):
  vocab, length = 5, 3
  captioner = model(vocab=vocab)
  pictures = images(3)
  out = generate(
    captioner, pictures, max_len=length, method="beam", num_beams=vocab**length,
    length_penalty=penalty, **IDS,
  )  # fmt: skip
  reference = Reference(captioner, pictures)
  best = [(-np.inf, None)] * 3
  for words in itertools.product(range(vocab), repeat=length):
    end = words.index(EOS) + 1 if EOS in words else length
    if any(w != PAD for w in words[end:]):
      continue  # duplicate caption
    total = np.zeros(3)
    for t in range(end):
      written = np.tile(np.array(words[:t], np.int32), (3, 1)).reshape(3, t)
      total += reference.next(written)[:, words[t]]
    for b in range(3):
      best[b] = max(best[b], (total[b] / end**penalty, words))
  for b in range(3):
    assert tuple(np.asarray(out.ids[b])) == best[b][1]
    np.testing.assert_allclose(out.log_prob[b] / out.length[b] ** penalty, best[b][0], atol=1e-4)


def test_beam_is_at_least_as_good_as_greedy_without_penalty():
  captioner = model()
  greedy = generate(captioner, images(32), max_len=T, **IDS)
  beam = generate(
    captioner, images(32), max_len=T, method="beam", num_beams=6, length_penalty=0.0, **IDS
  )
  # Not guaranteed (the greedy path can leave the beam), but true for these weights.
  assert (beam.log_prob >= greedy.log_prob - 1e-4).all()
  assert (beam.log_prob > greedy.log_prob + 1e-2).any()


def sample(captioner, pictures, seed=0, **options):
  return generate(
    captioner, pictures, max_len=T, method="sample", key=jax.random.key(seed), **IDS, **options
  )


def test_sampling_follows_the_model():
  captioner = model()
  picture = jnp.repeat(images(1), 3000, axis=0)
  first = np.asarray(sample(captioner, picture).ids[:, 0])
  expected = np.exp(Reference(captioner, images(1)).next(np.zeros((1, 0), np.int32))[0])
  share = np.bincount(first, minlength=V) / 3000
  # The standard error of a fraction is at most 0.5 / sqrt(3000) = 0.009; tolerance: four of them.
  np.testing.assert_allclose(share, expected, atol=0.037)


def test_top_p_draws_only_from_the_nucleus():
  captioner = model()
  picture = jnp.repeat(images(1), 2000, axis=0)
  probability = np.exp(Reference(captioner, images(1)).next(np.zeros((1, 0), np.int32))[0])
  order = probability.argsort()[::-1]
  size = int(np.searchsorted(probability[order].cumsum(), 0.6)) + 1
  assert 1 < size < V, "the test needs a nucleus that cuts something"
  drawn = set(np.asarray(sample(captioner, picture, top_p=0.6).ids[:, 0]).tolist())
  assert drawn == set(order[:size].tolist())


def test_top_k_weights_the_most_likely_tokens():
  captioner = model()
  picture = jnp.repeat(images(1), 3000, axis=0)
  probability = np.exp(Reference(captioner, images(1)).next(np.zeros((1, 0), np.int32))[0])
  likely = probability.argsort()[-3:]
  expected = np.zeros(V)
  expected[likely] = probability[likely] / probability[likely].sum()
  first = np.asarray(sample(captioner, picture, top_k=3).ids[:, 0])
  found = np.bincount(first, minlength=V) / 3000
  assert not found[expected == 0].any()
  # The standard error of a fraction is at most 0.5 / sqrt(3000) = 0.009; tolerance: four of them.
  np.testing.assert_allclose(found, expected, atol=0.037)


def test_captions_with_own_keys_do_not_depend_on_their_row():
  captioner = model()
  options = {"max_len": T, "method": "sample", "top_k": 4, **IDS}
  keys = jax.random.split(jax.random.key(0), 6)
  pictures = images()
  out = generate(captioner, pictures, key=keys, **options)
  turned = generate(captioner, pictures[::-1], key=keys[::-1], **options)
  np.testing.assert_array_equal(turned.ids[::-1], out.ids)
  same = generate(captioner, jnp.repeat(pictures[:1], 6, axis=0), key=keys, **options)
  assert len({tuple(row) for row in np.asarray(same.ids)}) > 1


def test_limits_of_sampling_are_greedy():
  captioner = model()
  greedy = generate(captioner, images(), max_len=T, **IDS).ids
  np.testing.assert_array_equal(sample(captioner, images(), temperature=1e-4).ids, greedy)
  np.testing.assert_array_equal(sample(captioner, images(), top_p=1e-6).ids, greedy)
  np.testing.assert_array_equal(sample(captioner, images(), top_k=1).ids, greedy)


def test_keys_decide_samples():
  captioner = model()
  chex.assert_trees_all_equal(sample(captioner, images(), 1), sample(captioner, images(), 1))
  assert (sample(captioner, images(), 1).ids != sample(captioner, images(), 2).ids).any()


def test_runs_inside_jit_and_compiles_once():
  config = model().config
  params = random_params(config)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def captions(params, pictures):
    return generate(bind(config, params), pictures, max_len=T, **IDS).ids

  for i in range(3):
    inside = captions(params, images() + i)
  outside = generate(bind(config, params), images() + 2, max_len=T, **IDS).ids
  np.testing.assert_array_equal(inside, outside)


class Pixels(nnx.Module):
  """Custom model whose decoder reads patches of pixels."""

  def __init__(self, decoder):
    self.decoder = decoder

  def encode(self, pictures, key=None):
    return None, pictures.reshape(pictures.shape[0], 32, 24)


def test_custom_model_with_encode_and_decoder():
  own = Pixels(model().decoder)
  out = generate(own, images(), max_len=T, method="beam", **IDS)
  assert len({tuple(row) for row in np.asarray(out.ids)}) > 1
  reference = Reference(own, images())
  ids = np.asarray(out.ids)
  total = np.zeros(6)
  for t in range(T):
    wrote = t < np.asarray(out.length)
    total += np.where(wrote, reference.next(ids[:, :t])[np.arange(6), ids[:, t]], 0.0)
  np.testing.assert_allclose(out.log_prob, total, atol=1e-4)


def test_new_parameters_do_not_recompile():
  config = model().config
  generate(model(), images(), max_len=T, **IDS)
  before = _generate._cache_size()
  for seed in range(2):
    generate(bind(config, random_params(config, seed)), images(), max_len=T, **IDS)
  assert _generate._cache_size() == before


def test_models_without_autoregressive_decoder():
  config = QueryDecoderConfig(width=8, depth=1, mlp_dim=8, num_heads=2, vocab_size=V, num_queries=4)
  own = Pixels(QueryDecoder(config, 24, rngs=nnx.Rngs(0)))
  with pytest.raises(TypeError, match=r"decoder of Pixels is a QueryDecoder.*with a DecoderConfig"):
    generate(own, images(), max_len=T, **IDS)
  with pytest.raises(TypeError, match=r"decoder of ViT is a NoneType"):
    generate(model().encoder, images(), max_len=T, **IDS)


def test_bfloat16_runs():
  config = model().config
  low = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, dtype="bfloat16"))
  out = generate(bind(low, random_params(low)), images(), max_len=T, method="beam", **IDS)
  assert np.isfinite(out.log_prob).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "best"}, r"method='best' is unknown; choose one of greedy, sample, beam"),
    ({"method": "sample"}, r"pass key=jax.random.key\(seed\)"),
    ({"max_len": 9}, r"max_len=9 exceeds the 8 learned positions"),
    ({"max_len": 0}, r"max_len=0 must be at least 1"),
    ({"eos_id": 12}, r"eos_id=12 is outside the vocabulary of 12 tokens"),
    ({"temperature": 0.0}, r"temperature=0.0 must be positive; use method='greedy'"),
    ({"top_p": 0.0}, r"top_p=0.0 is out of range"),
    ({"top_k": 0}, r"top_k=0 must be at least 1"),
    ({"num_beams": 0, "method": "beam"}, r"num_beams=0 must be at least 1"),
  ],
)
def test_invalid_options(options, message):
  with pytest.raises(ValueError, match=message):
    generate(model(), images(), **({"max_len": T} | IDS | options))


def test_sincos_positions_allow_any_length():
  out = generate(model(position="sincos"), images(), max_len=2 * T, **IDS)
  assert out.ids.shape == (6, 2 * T)
