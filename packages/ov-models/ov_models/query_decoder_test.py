"""Tests of the query decoder: published sizes, attention mask and initialisation.

//tests/golden:openvision1_model_test compares the numbers with the released OpenVision code.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_models import QueryDecoder, QueryDecoderConfig
from ov_models.testing import random_like

K, T, Q, E, W, V = 5, 4, 6, 24, 16, 30


class Jitted:
  """A small decoder as a compiled function of (params, image tokens, text tokens)."""

  def __init__(self, text_width=W, **options):
    config = QueryDecoderConfig(
      width=32, depth=2, mlp_dim=64, num_heads=2, vocab_size=V, num_queries=Q, **options
    )
    make = lambda: QueryDecoder(config, E, text_width, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(nnx.eval_shape(make))
    self.params = random_like(nnx.to_pure_dict(state))
    # Unit scale, as initialised; smaller queries would hardly affect each other.
    self.params["queries"] *= 10
    self.call = jax.jit(lambda params, *tokens: nnx.merge(graphdef, params)(*tokens))

  def __call__(self, *tokens):
    return self.call(self.params, *tokens)


@pytest.fixture(scope="module")
def decoder():
  return Jitted()


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def inputs(batch=2):
  image = jax.random.normal(jax.random.key(5), (batch, K, E))
  return image, jax.random.normal(jax.random.key(6), (batch, T, W))


# (variant, width of its vision tower, of its text tower, parameters): OpenVision, 128 queries.
PUBLISHED = [
  ("Ti", 192, 192, 11_581_056),
  ("S", 384, 384, 33_926_400),
  ("B", 768, 512, 54_934_528),
  ("L", 1024, 768, 111_106_560),
  ("So400m", 1152, 1152, 451_134_576),
  ("H", 1280, 1024, 337_569_792),
]


@pytest.mark.parametrize(("name", "image", "text", "count"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, image, text, count):
  config = QueryDecoderConfig.from_name(name)
  shapes = nnx.state(nnx.eval_shape(lambda: QueryDecoder(config, image, text, rngs=nnx.Rngs(0))))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_queries_are_causal(decoder):
  # With two layers, a query would affect all queries if image and text attended to it.
  before = decoder(*inputs())
  assert before.shape == (2, Q, 32)
  for at in range(Q):
    params = decoder.params | {"queries": decoder.params["queries"].at[at].multiply(-1.0)}
    after = decoder.call(params, *inputs())
    changed = np.abs(after - before).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(changed, np.arange(Q) >= at)


def test_queries_attend_to_all_image_and_text_tokens(decoder):
  image, text = inputs()
  before = decoder(image, text)
  changed = [decoder(image.at[:, k].add(1.0), text) for k in range(K)]
  changed += [decoder(image, text.at[:, t].add(1.0)) for t in range(T)]
  for after in changed:
    assert (np.abs(after - before).max(axis=2) > 1e-5).all()


def test_rows_are_independent_and_the_prefix_has_no_order(decoder):
  image, text = inputs()
  whole = decoder(image, text)
  np.testing.assert_allclose(whole[1:], decoder(image[1:], text[1:]), atol=1e-5)
  np.testing.assert_allclose(whole, decoder(image[:, ::-1], text[:, ::-1]), atol=1e-5)


def test_without_text_equals_empty_text(decoder):
  image, text = inputs()
  alone = Jitted(text_width=None)
  alone.params = {k: v for k, v in decoder.params.items() if k != "text_proj"}
  np.testing.assert_allclose(alone(image), decoder(image, text[:, :0]), atol=1e-6)


def test_options_of_the_blocks_do_not_change_values(decoder):
  loss = lambda jitted: lambda params: (jitted.call(params, *inputs()) ** 3).mean()
  expected = jax.value_and_grad(loss(decoder))(decoder.params)
  other = jax.value_and_grad(loss(Jitted(scan=False, remat="full")))(decoder.params)
  for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
    # The gradient of a key bias is zero up to rounding, hence the 1e-8.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-8)


def test_hidden_is_float32_also_under_bfloat16(decoder):
  exact, low = decoder(*inputs()), Jitted(dtype="bfloat16")(*inputs())
  assert low.dtype == jnp.float32
  # Hidden states have unit scale; bfloat16 rounding in two blocks gives errors of a few percent.
  assert 0 < np.abs(low - exact).max() < 0.1


def test_initial_scales_are_the_published_ones():
  # The residual scale uses depth 12 for every depth, see decoder.text_style.
  config = QueryDecoderConfig(width=128, depth=2, mlp_dim=256, num_heads=2, vocab_size=500)
  make = jax.jit(lambda: nnx.state(QueryDecoder(config, 64, 256, rngs=nnx.Rngs(0))))
  params = nnx.to_pure_dict(make())
  block = params["blocks"]
  expected = [
    (params["queries"], 1.0),
    (params["image_proj"]["kernel"], 64**-0.5),
    (params["text_proj"]["kernel"], 256**-0.5),
    (params["head"]["kernel"], 128**-0.5),
    (block["attn"]["query"]["kernel"], 128**-0.5),
    (block["attn"]["out"]["kernel"], (128 * 24) ** -0.5),
    (block["mlp"]["up"]["kernel"], 256**-0.5),
    (block["mlp"]["down"]["kernel"], (128 * 24) ** -0.5),
  ]
  for values, std in expected:
    # At least 8,000 samples: the standard error is below 1%.
    np.testing.assert_allclose(np.std(values), std, rtol=0.04)


def test_invalid_arguments(decoder):
  image, text = inputs()
  with pytest.raises(ValueError, match=r"pass text_tokens \[B, T, 16\], or build it with text_w"):
    decoder(image)
  with pytest.raises(ValueError, match=r"shape \(2, 4, 16\).*or build it with text_width=16"):
    Jitted(text_width=None)(image, text)
  with pytest.raises(ValueError, match="num_queries=0 must be a positive integer"):
    QueryDecoderConfig.from_name("Ti", num_queries=0)
  with pytest.raises(ValueError, match="decoder variant='XL' is unknown"):
    QueryDecoderConfig.from_name("XL")
