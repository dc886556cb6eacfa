"""Tests of the text tower: published sizes, attention mask and pooling.

//tests/golden:openvision1_model_test compares the numbers with the released OpenVision code.
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ov_models import EMBED_DIMS, PRESETS, TEXT_VARIANTS, TextConfig, bind, init, num_params
from ov_models.testing import random_params

T, V, D, CLS = 8, 30, 32, 29
TEXT = TextConfig(width=D, depth=2, mlp_dim=64, num_heads=2, vocab_size=V, max_len=T)
POOLS = ("last", "first", "argmax", "mean", "map")
# Two texts of four words, with padding before the final [CLS].
IDS = np.array([[1, 5, 9, 4, 0, 0, 0, CLS], [1, 7, 7, 3, 0, 0, 0, CLS]], np.int32)


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@partial(jax.jit, static_argnums=0)
def forward(config, params, ids):
  return bind(config, params)(ids)


def run(config, ids=IDS, params=None):
  params = random_params(config) if params is None else params
  return forward(config, params, ids)


def options(**fields):
  return dataclasses.replace(TEXT, **fields)


# Vocabulary 32,000, 80 positions and a head of width E without bias, as published.
PUBLISHED = {
  "Ti": 11_534_976,
  "S": 33_760_512,
  "B": 54_516_736,
  "L": 110_283_264,
  "So400m": 449_752_176,
  "H": 336_209_920,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  config = TextConfig.from_name(name, preset="openvision_released")
  assert num_params(config) + config.width * EMBED_DIMS[name] == PUBLISHED[name]


@pytest.mark.parametrize("name", TEXT_VARIANTS)
def test_every_variant_has_the_parameters_of_its_sizes(name):
  config = TextConfig.from_name(name, vocab_size=1000, max_len=20)
  d, f = config.width, config.mlp_dim
  block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
  assert num_params(config) == 1020 * d + config.depth * block + 2 * d


def test_presets():
  fields = lambda preset: dataclasses.asdict(TextConfig.from_name("Ti", preset=preset)).items()
  for preset, expected in PRESETS.items():
    assert expected.text.items() <= fields(preset)
  assert fields("default") == dataclasses.asdict(TextConfig.from_name("Ti")).items()
  ours = TextConfig.from_name("L", 100, 12, preset="clip", pool="mean", dtype="bfloat16")
  assert (ours.vocab_size, ours.max_len, ours.mask) == (100, 12, "causal")
  assert (ours.pool, ours.dtype) == ("mean", "bfloat16")


def layer_norm(x, params):
  x = np.asarray(x, np.float64)
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(x, params):
  return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"])


def attention_pool(x, params, seen):
  """Pool the `seen` tokens [T, D] by one learned query and a residual MLP."""
  x = x[seen]
  q = dense(np.asarray(params["probe"])[None], params["attn"]["query"]).reshape(2, D // 2)
  k, v = (dense(x, params["attn"][name]).reshape(-1, 2, D // 2) for name in ("key", "value"))
  weights = np.exp(np.einsum("nh,tnh->nt", q, k) / np.sqrt(D // 2))
  weights /= weights.sum(axis=1, keepdims=True)
  pooled = dense(np.einsum("nt,tnh->nh", weights, v).reshape(D), params["attn"]["out"])
  hidden = gelu(dense(layer_norm(pooled, params["norm"]), params["mlp"]["up"]))
  return pooled + dense(hidden, params["mlp"]["down"])


@pytest.mark.parametrize("padding", ["mask", "attend"])
@pytest.mark.parametrize("pool", POOLS)
def test_pooling_against_a_direct_computation(pool, padding):
  config = options(pool=pool, padding=padding)
  params = random_params(config)
  out = run(config, params=params)
  assert out.tokens.shape == (2, T, D)
  normed = layer_norm(out.tokens, params["norm"])
  seen = IDS != 0 if padding == "mask" else np.ones_like(IDS, bool)
  expected = {
    "last": lambda x, seen: x[-1],
    "first": lambda x, seen: x[0],
    "argmax": lambda x, seen: x[T - 1],  # CLS has the largest id
    "mean": lambda x, seen: x[seen].mean(axis=0),
    "map": lambda x, seen: attention_pool(x, params["pool"], seen),
  }[pool]
  # float32 against float64; entries have size 1.
  direct = [expected(x, row) for x, row in zip(normed, seen, strict=True)]
  np.testing.assert_allclose(out.pooled, direct, atol=2e-5)


def test_attention_pooling_has_plain_attention_and_mlp():
  config = options(
    pool="map", mlp="gated", qk_norm=True, attention_gate=True, layer_scale=0.5, padding="attend"
  )
  params = random_params(config)
  out = run(config, params=params)
  normed = layer_norm(out.tokens, params["norm"])
  direct = [attention_pool(x, params["pool"], np.ones(T, bool)) for x in normed]
  np.testing.assert_allclose(out.pooled, direct, atol=2e-5)  # as above


def test_argmax_is_where_the_id_is_largest():
  config = options(pool="argmax", mask="causal")
  params = random_params(config)
  ids = np.array([[1, 5, 28, 4, 0, 0, 0, 0], [1, 28, 3, 28, 2, 0, 0, 0]], np.int32)
  out = run(config, ids, params)
  at = out.tokens[np.arange(2), [2, 1]]  # the first of two equal maxima
  np.testing.assert_allclose(out.pooled, layer_norm(at, params["norm"]), atol=2e-5)
  # As in CLIP, tokens after the end token are ignored.
  after = run(config, np.where(np.arange(T) > 3, 6, ids), params)
  np.testing.assert_array_equal(after.pooled, out.pooled)


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_attention_mask(mask):
  config = options(mask=mask, pool="argmax", padding="attend")
  params = random_params(config)
  ids = np.array([[1, 5, 9, 4, 6, 8, 3, 2], [9, 8, 7, 6, 5, 4, 3, 2]], np.int32)
  before = run(config, ids, params).tokens
  for at in range(T):
    changed_ids = ids.copy()
    changed_ids[:, at] += 10
    after = run(config, changed_ids, params).tokens
    changed = np.abs(after - before).max(axis=(0, 2)) > 1e-5
    np.testing.assert_array_equal(changed, (np.arange(T) >= at) if mask == "causal" else True)


PADDED = IDS == 0


def with_other_padding(config):
  """Return the outputs with the original and with another padding embedding."""
  params = random_params(config)
  embedding = params["embed"]["embedding"]
  other = params | {"embed": {"embedding": embedding.at[0].set(-3 * embedding[12])}}
  return run(config, params=params), run(config, params=other)


@pytest.mark.parametrize("pool", POOLS)
def test_masked_padding_is_ignored(pool):
  before, after = with_other_padding(options(pool=pool))
  np.testing.assert_array_equal(after.pooled, before.pooled)
  np.testing.assert_array_equal(after.tokens[~PADDED], before.tokens[~PADDED])
  assert (np.abs(after.tokens - before.tokens)[PADDED].max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("pool", POOLS)
def test_released_preset_attends_to_padding(pool):
  config = options(**PRESETS["openvision_released"].text | {"pool": pool})
  before, after = with_other_padding(config)
  assert (np.abs(after.pooled - before.pooled).max(axis=1) > 1e-4).all()
  assert (np.abs(after.tokens - before.tokens).max(axis=2) > 1e-4).all()


@pytest.mark.parametrize("pool", ["mean", "map"])
def test_texts_may_be_padded_to_any_length(pool):
  config = options(pool=pool)
  params = random_params(config)
  ids = np.array([[1, 5, 9, 2], [1, 7, 2, 0]], np.int32)
  short = run(config, ids, params)
  long = run(config, np.pad(ids, ((0, 0), (0, T - 4))), params)
  # The sums include more masked terms.
  np.testing.assert_allclose(long.pooled, short.pooled, atol=1e-5)
  np.testing.assert_allclose(long.tokens[:, :4], short.tokens, atol=1e-5)
  attend = options(pool=pool, padding="attend")
  longer = run(attend, np.pad(ids, ((0, 0), (0, T - 4))), params)
  assert np.abs(longer.pooled - run(attend, ids, params).pooled).max() > 1e-3


def test_custom_pad_id():
  config = options(pool="mean", pad_id=3)
  params = random_params(config)
  ids = np.array([[1, 5, 0, 9, 3, 3, 3, 3]] * 2, np.int32)
  np.testing.assert_allclose(
    run(config, ids, params).pooled, run(config, ids[:, :4], params).pooled, atol=1e-5
  )


@pytest.mark.parametrize("pool", POOLS)
def test_text_of_padding_only_is_finite(pool):
  config = options(pool=pool)
  empty = run(config, np.stack([IDS[0], np.zeros(T, np.int32)]))
  chex.assert_tree_all_finite(empty)
  np.testing.assert_allclose(empty.pooled[0], run(config).pooled[0], atol=1e-6)


def test_positions_are_learned_rows():
  config = options(pool="mean", padding="attend")
  params = random_params(config)
  ids = np.full((2, T), 5, np.int32)
  tokens = run(config, ids, params).tokens
  assert (
    np.abs(tokens - tokens[:, :1]).max(axis=2)[0, 1:].min() > 1e-2
  )  # equal words at different positions
  zero = params | {"position_embedding": jnp.zeros((T, D))}
  tokens = run(config, ids, zero).tokens
  np.testing.assert_allclose(tokens, jnp.broadcast_to(tokens[:, :1], tokens.shape), atol=1e-5)
  # Without positions the tower is invariant to word order.
  a, b = run(config, IDS, zero).pooled, run(config, IDS[:, ::-1], zero).pooled
  np.testing.assert_allclose(a, b, atol=1e-5)
  assert np.abs(run(config, IDS).pooled - run(config, IDS[:, ::-1]).pooled).max() > 1e-2


def test_options_of_the_blocks_do_not_change_values():
  @partial(jax.jit, static_argnums=0)
  def value_and_grad(config, params):
    return jax.value_and_grad(lambda p: (forward(config, p, IDS).pooled ** 3).mean())(params)

  params = random_params(TEXT)
  expected = value_and_grad(TEXT, params)
  for fields in ({"scan": False}, {"remat": "full"}, {"remat": "dots", "scan": False}):
    other = value_and_grad(options(**fields), params)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
      # The gradient of a key bias is zero up to rounding, hence the 1e-7.
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("pool", ["last", "mean", "map"])
def test_bfloat16_is_close_and_pools_in_float32(pool):
  exact, low = run(options(pool=pool)), run(options(pool=pool, dtype="bfloat16"))
  assert low.tokens.dtype == jnp.bfloat16
  assert low.pooled.dtype == jnp.float32
  # Normalised values have size 1; bfloat16 rounding in two blocks gives a few percent.
  assert 0 < np.abs(low.pooled - exact.pooled).max() < 0.1


def test_initial_scales_are_the_published_ones():
  # The residual scale uses depth 12 for every depth, see decoder.text_style.
  d = 128
  config = TextConfig(width=d, depth=4, mlp_dim=256, num_heads=2, vocab_size=500, max_len=64)
  params = init(config, jax.random.key(0))
  blocks = params["blocks"]
  expected = [
    (params["embed"]["embedding"], 0.02),
    (params["position_embedding"], 0.01),
    *((blocks["attn"][name]["kernel"], d**-0.5) for name in ("query", "key", "value")),
    (blocks["attn"]["out"]["kernel"], (d * 24) ** -0.5),
    (blocks["mlp"]["up"]["kernel"], (2 * d) ** -0.5),
    (blocks["mlp"]["down"]["kernel"], (d * 24) ** -0.5),
  ]
  for values, std in expected:
    # At least 8,192 samples: the standard error is below 1%.
    np.testing.assert_allclose(np.std(values), std, rtol=0.04)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
    ({"max_len": -1}, "max_len=-1 must be a positive integer"),
    ({"pool": "frist"}, r"pool='frist' is unknown.*nearest: first"),
    ({"mask": "prefix"}, "mask='prefix' is unknown"),
    ({"padding": "skip"}, "padding='skip' is unknown"),
    ({"pad_id": V}, "pad_id=30 is not in the vocabulary of 30"),
    ({"pool": "first", "mask": "causal"}, "first token attends to itself only; set pool='last'"),
  ],
)
def test_invalid_configs(fields, message):
  with pytest.raises(ValueError, match=message):
    options(**fields)


def test_unknown_names():
  with pytest.raises(ValueError, match="text variant='XL' is unknown"):
    TextConfig.from_name("XL")
  with pytest.raises(ValueError, match="preset='released' is unknown.*nearest: openvision_rel"):
    TextConfig.from_name("Ti", preset="released")


@pytest.mark.parametrize(
  ("pool", "shape", "message"),
  [
    ("last", (2, T - 1), r"texts of 7 tokens, but pool='last' reads .* column 7; pad or truncate"),
    ("last", (2, T + 1), r"texts of 9 tokens, but pool='last'"),
    ("mean", (2, T + 1), r"text of 9 tokens exceeds max_len=8"),
    ("mean", (T,), r"ids have shape \(8,\); expected \[B, T\]"),
  ],
)
def test_invalid_ids(pool, shape, message, monkeypatch):
  # Disable the jaxtyping checks, as in production.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    run(options(pool=pool), np.ones(shape, np.int32))
