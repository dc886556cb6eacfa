"""Tests of parallel prediction (CapPa) mixed with autoregressive rows."""

from flax import nnx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ov_models import Decoder, DecoderConfig
from ov_models.testing import random_like

K, T, V, E, D, N = 3, 5, 30, 24, 32, 2
PARALLEL = jnp.array([True, False, True, False])


class Jitted:
  """A small decoder as a compiled function of (params, image tokens, ids, parallel)."""

  def __init__(self, **options):
    options = {"parallel": True, "mask": "prefix", "position": "learned"} | options
    config = DecoderConfig(
      width=D, depth=2, mlp_dim=64, num_heads=N, vocab_size=V, max_len=T, **options
    )
    make = lambda: Decoder(config, E, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(nnx.eval_shape(make))
    self.params = random_like(nnx.to_pure_dict(state))
    self.call = jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))

  def __call__(self, *args):
    return self.call(self.params, *args)


@pytest.fixture(scope="module", params=["prefix", "causal"])
def decoder(request):
  jitted = Jitted(mask=request.param)
  jitted.mask = request.param
  return jitted


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def inputs(seed=0):
  image_key, ids_key = jax.random.split(jax.random.key(seed))
  ids = jax.random.randint(ids_key, (4, T), 0, V)
  return jax.random.normal(image_key, (4, K, E)), ids


def naive(params, image, ids, parallel, mask):
  """Compute the decoder by its definition, row by row and head by head."""

  def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

  dense = lambda p, x: x @ p["kernel"] + p["bias"]

  def sees(row, query, key):
    before = key <= query or (mask == "prefix" and key < K)
    return True if parallel[row] else before

  rows = []
  for row in range(ids.shape[0]):
    words = [
      params["mask_embedding"] if parallel[row] else params["embed"]["embedding"][i]
      for i in ids[row]
    ]
    text = jnp.stack(words) + params["position_embedding"]
    x = jnp.concatenate([image[row] @ params["image_proj"]["kernel"], text])
    size = K + T
    allowed = np.array([[sees(row, q, k) for k in range(size)] for q in range(size)])
    for layer in range(2):
      p = jax.tree.map(lambda a, layer=layer: a[layer], params["blocks"])
      y = norm(p["norm1"], x)
      q, k, v = (dense(p["attn"][n], y).reshape(size, N, -1) for n in ("query", "key", "value"))
      heads = []
      for h in range(N):
        weights = jnp.where(allowed, jnp.exp(q[:, h] @ k[:, h].T / np.sqrt(D // N)), 0.0)
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
      x = x + dense(p["attn"]["out"], jnp.concatenate(heads, axis=-1))
      y = dense(p["mlp"]["up"], norm(p["norm2"], x))
      x = x + dense(p["mlp"]["down"], jax.nn.gelu(y, approximate=True))
    rows.append(norm(params["norm"], x[K:]))
  return jnp.stack(rows)


def test_value_and_gradients_equal_the_naive_form(decoder):
  image, ids = inputs()

  def loss(hidden_of):
    def value(params, image):
      hidden = hidden_of(params, image)
      return (hidden**3).mean(), hidden

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))

  ours = loss(lambda params, image: decoder.call(params, image, ids, PARALLEL))
  slow = loss(
    lambda params, image: naive(
      params, image, np.asarray(ids), np.asarray(PARALLEL), decoder.mask
    )
  )  # fmt: skip
  used = {k: v for k, v in decoder.params.items() if k != "head"}
  (_, hidden), (grads, image_grad) = ours(decoder.params, image)
  (_, expected), expected_grads = slow(used, image)
  # Different order of float32 sums in two blocks; hidden states have unit scale.
  np.testing.assert_allclose(hidden, expected, atol=1e-5)
  np.testing.assert_array_equal(grads.pop("head")["kernel"], 0.0)
  leaves = zip(jax.tree.leaves((grads, image_grad)), jax.tree.leaves(expected_grads), strict=True)
  for a, b in leaves:
    # The gradient of a key bias is zero up to rounding, hence the 1e-8.
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max() + 1e-8)


def test_parallel_rows_ignore_the_words(decoder):
  image, ids = inputs()
  before, after = decoder(image, ids, PARALLEL), decoder(image, (ids + 1) % V, PARALLEL)
  np.testing.assert_array_equal(before[PARALLEL], after[PARALLEL])
  assert (np.abs(before - after)[~PARALLEL].max(axis=2) > 1e-4).all()
  # The other rows are unchanged by parallel prediction.
  np.testing.assert_allclose(before[~PARALLEL], decoder(image, ids)[~PARALLEL], atol=1e-6)
  np.testing.assert_allclose(
    decoder(image, ids, jnp.zeros(4, bool)), decoder(image, ids), atol=1e-6
  )


def test_parallel_rows_attend_to_later_positions(decoder):
  image, ids = inputs()
  before = decoder(image, ids, PARALLEL)
  for at in range(T):
    table = decoder.params["position_embedding"].at[at].multiply(-1.0)
    params = decoder.params | {"position_embedding": table}
    changed = np.abs(decoder.call(params, image, ids, PARALLEL) - before).max(axis=2) > 1e-6
    assert changed[PARALLEL].all()
    np.testing.assert_array_equal(changed[~PARALLEL], np.tile(np.arange(T) >= at, (2, 1)))


def test_parallel_rows_depend_on_image_and_position(decoder):
  image, ids = inputs()
  everywhere = jnp.ones(4, bool)
  before = decoder(image, ids, everywhere)
  for k in range(K):
    after = decoder(image.at[:, k].add(1.0), ids, everywhere)
    assert (np.abs(after - before).max(axis=2) > 1e-5).all()
  assert (np.abs(before[:, 1:] - before[:, :-1]).max(axis=2) > 1e-3).all()


def test_mask_embedding_exists_only_with_parallel(decoder):
  plain = Jitted(parallel=False).params
  assert jax.tree.map(jnp.shape, plain | {"mask_embedding": jnp.zeros(D)}) == jax.tree.map(
    jnp.shape, decoder.params
  )
  assert "mask_embedding" not in plain


def test_sincos_positions_and_bfloat16():
  image, ids = inputs()
  exact = Jitted(position="sincos")(image, ids, PARALLEL)
  low = Jitted(position="sincos", dtype="bfloat16")(image, ids, PARALLEL)
  assert low.dtype == jnp.float32
  # Hidden states have unit scale; bfloat16 rounding in two blocks gives errors of a few percent.
  assert 0 < np.abs(low - exact).max() < 0.1


def test_invalid_arguments(decoder, monkeypatch):
  # Disable the jaxtyping checks, as in production.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  image, ids = inputs()
  with pytest.raises(ValueError, match=r"position='none' with parallel=True.*'learned' or 'sinc"):
    Jitted(position="none")
  for kernel in ("cudnn", "tpu"):
    match = f"attention='{kernel}' has no kernel for parallel prediction.*set attention='xla'"
    with pytest.raises(ValueError, match=match):
      Jitted(attention=kernel, dtype="bfloat16")
  with pytest.raises(ValueError, match=r"no mask embedding; build it with parallel=True"):
    Jitted(parallel=False)(image, ids, PARALLEL)
  with pytest.raises(ValueError, match=r"parallel has shape \(3,\); expected \(4,\)"):
    decoder(image, ids, PARALLEL[:3])
