import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_losses import caption_cross_entropy, contrastive_softmax, gradient_cache

ROWS, INPUT, WIDTH, HIDDEN, TOKENS, VOCAB = 24, 10, 8, 32, 5, 17


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)
  return {
    "image": {"in": normal(INPUT, HIDDEN), "out": normal(HIDDEN, WIDTH)},
    "text": {"in": normal(INPUT, HIDDEN), "out": normal(HIDDEN, WIDTH)},
    "head": normal(HIDDEN, VOCAB),
    "log_scale": jnp.asarray(1.5),
  }


def make_batch(rows=ROWS, seed=1):
  """Return rows with different numbers of caption tokens; two rows are invalid."""
  rng = np.random.default_rng(seed)
  valid = np.ones(rows, bool)
  valid[[2, 5]] = False
  return {
    "image": rng.standard_normal((rows, INPUT)).astype(np.float32),
    "text": rng.standard_normal((rows, INPUT)).astype(np.float32),
    "groups": rng.integers(0, rows // 2, rows).astype(np.int32),
    "labels": rng.integers(0, VOCAB, (rows, TOKENS)).astype(np.int32),
    "mask": (rng.random((rows, TOKENS)) < 0.2 + 0.7 * (np.arange(rows) % 4 == 0)[:, None])
    * valid[:, None],
    "valid": valid,
  }


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embed(params, batch, key):
  del key
  hidden = jax.nn.gelu(batch["image"] @ params["image"]["in"])
  rows = {
    "image": unit(hidden @ params["image"]["out"]),
    "text": unit(jax.nn.gelu(batch["text"] @ params["text"]["in"]) @ params["text"]["out"]),
    "valid": batch["valid"],
    "groups": batch["groups"],
  }
  states = jnp.broadcast_to(hidden[:, None], (len(hidden), TOKENS, HIDDEN))
  out = caption_cross_entropy(states, params["head"], batch["labels"], batch["mask"])
  metrics = {"accuracy": out.num_correct / jnp.maximum(out.num_tokens, 1)}
  return rows, (2 * out.loss, out.num_tokens, metrics)


def combine(params, rows):
  out = contrastive_softmax(
    rows["image"],
    rows["text"],
    jnp.exp(params["log_scale"]),
    valid=rows["valid"],
    text_groups=rows["groups"],
  )
  return out.loss, out.num_valid, {"image_top1": out.image_top1}


def split(batch, k):
  """Split rows into microbatches: row i of microbatch j is row i * k + j."""
  return jax.tree.map(lambda x: np.stack([x[j::k] for j in range(k)]), batch)


def whole(params, batch, embed=embed):
  rows, own = embed(params, batch, jax.random.key(0))
  out = combine(params, rows)
  return out[0] + own[0], (own, out)


@pytest.mark.parametrize("k", [1, 6])
def test_equals_the_gradient_of_the_full_batch(k):
  params, batch = make_params(), make_batch()
  (loss, (own, out)), expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params, batch)

  cached = jax.jit(lambda p, b: gradient_cache(embed, combine, p, b, jax.random.key(0)))
  grads, terms = cached(params, split(batch, k))

  # Different order of float32 sums.
  np.testing.assert_allclose(terms.loss, loss, rtol=1e-6)
  assert terms.weight == ROWS - 2
  assert terms.metrics["image_top1"] == out[2]["image_top1"]
  np.testing.assert_allclose(terms.metrics["accuracy"], own[2]["accuracy"], rtol=1e-6)
  chex.assert_trees_all_equal_structs(grads, expected)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(expected))  # every part has a gradient


def two_means(params, batch, key):
  """Return a loss over tokens and one over valid rows, with different weights per microbatch."""
  rows, of_tokens = embed(params, batch, key)
  count = batch["valid"].sum().astype(jnp.float32)
  error = jnp.where(batch["valid"], (rows["image"] ** 4).sum(1), 0)
  of_rows = error.sum() / jnp.maximum(count, 1)
  return rows, [of_tokens, (of_rows, count, {"error": of_rows})]


@pytest.mark.parametrize("k", [1, 6])
def test_losses_with_different_weights(k):
  params, batch = make_params(), make_batch()

  def whole(params):
    rows, own = two_means(params, batch, None)
    return combine(params, rows)[0] + sum(terms[0] for terms in own), own

  (loss, own), expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
  cached = jax.jit(lambda p, b: gradient_cache(two_means, combine, p, b, jax.random.key(0)))
  grads, terms = cached(params, split(batch, k))
  # Different order of float32 sums.
  np.testing.assert_allclose(terms.loss, loss, rtol=1e-6)
  for name, of in (("accuracy", own[0]), ("error", own[1])):
    np.testing.assert_allclose(terms.metrics[name], of[2][name], rtol=1e-6)
  chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_rows_keep_the_order_of_the_full_batch():
  batch = {"index": np.arange(12, dtype=np.int32)}
  seen = {}

  def note(params, rows):
    seen["order"] = rows["index"]
    return params.sum(), jnp.float32(12), {}

  nothing = (jnp.float32(0), jnp.float32(0), {})
  gradient_cache(
    lambda p, b, key: (b, nothing), note, jnp.ones(2), split(batch, 3), jax.random.key(0)
  )
  np.testing.assert_array_equal(seen["order"], np.arange(12))


def test_both_passes_use_the_same_randomness():
  # With noisy embeddings, both passes must use the same random numbers.
  params, batch = make_params(), make_batch()
  k = 4

  def noisy(params, batch, key):
    rows, own = embed(params, batch, key)
    noise = jax.random.normal(key, rows["image"].shape)
    return rows | {"image": unit(rows["image"] * (1 + 0.5 * noise))}, own

  key = jax.random.key(3)
  noise = jnp.stack(
    [jax.random.normal(jax.random.fold_in(key, j), (ROWS // k, WIDTH)) for j in range(k)]
  )
  noise = noise.swapaxes(0, 1).reshape(ROWS, WIDTH)

  def same_noise(params, batch, key):
    rows, own = embed(params, batch, key)
    return rows | {"image": unit(rows["image"] * (1 + 0.5 * noise))}, own

  expected = jax.jit(jax.grad(lambda p: whole(p, batch, same_noise)[0]))(params)
  grads, _ = jax.jit(lambda p: gradient_cache(noisy, combine, p, split(batch, k), key))(params)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_microbatches_without_tokens_have_weight_zero():
  params, batch = make_params(), make_batch()
  cached = jax.jit(
    lambda batches: gradient_cache(embed, combine, params, batches, jax.random.key(0))
  )
  batch["mask"][1::3] = False  # all of microbatch 1
  expected = jax.jit(jax.grad(lambda p: whole(p, batch)[0]))(params)
  grads, _ = cached(split(batch, 3))
  np.testing.assert_allclose(grads["head"], expected["head"], rtol=1e-5, atol=1e-7)

  batch["mask"][:] = False
  grads, terms = cached(split(batch, 3))
  assert terms.metrics["accuracy"] == 0 and not grads["head"].any()
  together = jax.jit(lambda p: combine(p, embed(p, batch, None)[0])[0])(params)
  np.testing.assert_allclose(terms.loss, together, rtol=1e-6)


def test_memory_scales_with_the_microbatch():
  # 64 rows of 4,096 hidden numbers: 1 MiB of activations each layer in one piece.
  rows, hidden = 64, 4096
  params = {"in": jnp.zeros((INPUT, hidden)), "out": jnp.zeros((hidden, WIDTH))}
  x = jnp.zeros((rows, INPUT))

  def deep(params, x, key):
    for _ in range(4):
      x = x + jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"])[:, :1]
    return unit(x), (jnp.float32(0), jnp.float32(0), {})

  def pairs(params, rows):
    out = contrastive_softmax(rows, rows, jnp.float32(3.0))
    return out.loss, out.num_valid, {}

  def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

  key = jax.random.key(0)
  at_once = temporaries(jax.grad(lambda p, x: pairs(p, deep(p, x, key)[0])[0]), params, x)
  cached = temporaries(
    lambda p, x: gradient_cache(deep, pairs, p, x, key)[0], params, x.reshape(8, 8, INPUT)
  )
  assert cached < at_once / 3, (cached, at_once)
