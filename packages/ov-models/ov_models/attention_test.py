"""Tests of the attention implementations."""

from functools import partial

import chex
import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ov_models import attention
from ov_models.attention import FULL, Mask, attend

MASKS = [FULL, Mask("causal"), Mask("prefix", 5)]


def qkv(length, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (2, length, 3, 8), dtype) for key in keys]


def test_mask_arrays():
  np.testing.assert_array_equal(Mask("causal").array(3), [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
  np.testing.assert_array_equal(Mask("prefix", 2).array(3), [[1, 1, 0], [1, 1, 0], [1, 1, 1]])
  assert FULL.array(3).all()


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_xla_against_a_loop_and_against_jax(mask):
  q, k, v = qkv(9)
  out = attend(q, k, v, mask, "xla")
  allowed = mask.array(9)
  expected = np.zeros(q.shape)
  q_, k_, v_ = map(np.asarray, (q, k, v))
  for b, t, n in np.ndindex(*q.shape[:3]):
    score = k_[b, :, n] @ q_[b, t, n] / np.sqrt(8)
    weight = np.exp(score) * allowed[t]
    expected[b, t, n] = weight / weight.sum() @ v_[b, :, n]
  np.testing.assert_allclose(out, expected, atol=1e-5)
  theirs = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(allowed)[None, None])
  np.testing.assert_allclose(out, theirs, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
  ("mask", "scores"),
  [
    (Mask("causal"), [(128, 128), (128, 256), (44, 300)]),
    (Mask("prefix", 5), [(128, 128), (128, 256), (44, 300)]),
    (Mask("prefix", 200), [(128, 200), (128, 256), (44, 300)]),
  ],
  ids=["causal", "prefix", "long prefix"],
)
def test_long_texts_skip_masked_keys(mask, scores, padded):
  q, k, v = qkv(300)
  allowed = mask.array(300)[None, None]
  segments = None
  if padded:  # every query attends to a token
    segments = jnp.arange(300) < np.array([[300], [1]])
    allowed = allowed & np.asarray(segments)[:, None, None, :]

  def by_rows(q, k, v):
    return attend(q, k, v, mask, "xla", segments)

  def at_once(q, k, v):
    return attention.attend_xla(q, k, v, jnp.asarray(allowed))

  def value_and_gradients(form):
    return jax.jit(jax.value_and_grad(lambda *a: (form(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

  # Different summation order of up to 300 float32 terms.
  results = map(value_and_gradients, (by_rows, at_once))
  chex.assert_trees_all_close(*results, rtol=1e-5, atol=2e-5)
  products = [e for e in jax.make_jaxpr(by_rows)(q, k, v).eqns if e.primitive.name == "dot_general"]
  assert [e.outvars[0].aval.shape[2:] for e in products[::2]] == scores


def naive(q, k, v, mask, segments):
  """Compute attention by its definition, in the dtype of q."""
  allowed = jnp.asarray(mask.array(q.shape[1])) & (
    jnp.maximum(segments, 1)[:, :, None] == segments[:, None, :]
  )
  scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[3] ** 0.5
  weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum("bnts,bsnh->btnh", weights, v)


def packed(length):
  """Return segments of a row with two images and a row with one, both padded at the end."""
  first, second, one = length // 2, length // 3, 2 * length // 3
  rows = np.repeat([1, 2, 0], [first, second, length - first - second]), np.arange(length) < one
  return jnp.asarray(np.stack(rows), jnp.int32)


def padded(length):
  return packed(length) == 1


@pytest.mark.parametrize("segments", [packed(133), padded(133)], ids=["packed", "padded"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_segments_against_the_definition_in_float64(mask, segments):
  weight = (segments > 0)[:, :, None, None]

  def value_and_gradients(form, arrays):
    total = lambda *a: (weight * form(*a) ** 2).sum()
    return jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays)

  arrays = qkv(133)
  got = value_and_gradients(lambda *a: attend(*a, mask, "xla", segments), arrays)
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
    ids = segments.astype(jnp.int32)
    want = value_and_gradients(lambda *a: naive(*a, mask, ids), wide)
    want = jax.tree.map(np.asarray, want)
  chex.assert_trees_all_close(got, jax.tree.map(np.float32, want), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_other_segments_and_padding_are_ignored(mask):
  arrays, segments = qkv(133), packed(133)
  other = np.asarray(segments != 1)[:, :, None, None]
  changed = [jnp.where(other, 9.0, a) for a in arrays]

  def run(arrays):
    def total(*a):
      out = attend(*a, mask, "xla", segments)
      return jnp.where(other, 0, out).sum(), jnp.where(other, 0, out)

    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, grads

  out, grads = run(arrays)
  chex.assert_trees_all_equal((out, grads), run(changed))
  assert all((np.asarray(g)[np.broadcast_to(other, g.shape)] == 0).all() for g in grads)


@pytest.mark.parametrize("segments_of", [None, packed, padded])
@pytest.mark.parametrize(
  ("mask", "length"), [(FULL, 9), (Mask("causal"), 133), (Mask("prefix", 5), 9)]
)
def test_tpu_kernel_interpreted(mask, length, segments_of, monkeypatch):
  # Runs the kernel in interpret mode: values, gradients and the padding to 128.
  interpreted = partial(splash_attention.make_splash_mha_single_device, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  segments = None if segments_of is None else segments_of(length)

  def run(implementation, *args):
    def total(q, k, v):
      out = attend(q, k, v, mask, implementation, segments)
      return (out**2).sum(), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*args)

  with jax.default_matmul_precision("highest"):
    (_, out), grads = run("tpu", *qkv(length))
    (_, expected), expected_grads = run("xla", *qkv(length))
  assert np.isfinite(out).all()
  # Different summation order of up to 130 float32 terms.
  np.testing.assert_allclose(out, expected, atol=2e-6)
  chex.assert_trees_all_close(grads, expected_grads, atol=2e-5)


@pytest.mark.parametrize("length", [9, 130])
def test_tpu_kernel_lowers_for_tpu(length, monkeypatch):
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  loss = lambda q, k, v: attend(q, k, v, Mask("prefix", 5), "tpu").astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss)).trace(*qkv(length, jnp.bfloat16))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") >= 2  # forward and backward


@pytest.mark.parametrize("segments_of", [None, packed, padded])
@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_cudnn_gets_the_right_arguments(mask, segments_of, monkeypatch):
  # The kernel needs a GPU; the same call through XLA must give the same result.
  kernel = jax.nn.dot_product_attention
  seen = []

  def on_xla(q, k, v, implementation, **kwargs):
    seen.append((implementation, q.shape[1], kwargs.get("is_causal"), "mask" in kwargs))
    return kernel(q, k, v, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
  monkeypatch.setattr(attention, "platform", lambda: "gpu")
  q, k, v = qkv(9)
  segments = None if segments_of is None else segments_of(9)
  out = attend(q, k, v, mask, "cudnn", segments)
  chex.assert_trees_all_close(out, attend(q, k, v, mask, "xla", segments), atol=1e-5)
  array = mask.kind == "prefix" or segments is not None
  assert seen == [("cudnn", 10 if array else 9, None if array else mask.kind == "causal", array)]


@pytest.mark.parametrize(("implementation", "home"), [("cudnn", "gpu"), ("tpu", "tpu")])
def test_error_on_other_platforms(implementation, home):
  message = f"attention='{implementation}' runs on {home} only.*cpu; set attention='xla'"
  with pytest.raises(ValueError, match=message):
    attend(*qkv(9), FULL, implementation)


def test_shapes_are_checked_in_tests():
  q, k, v = qkv(9)
  with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'v'"):
    attend(q, k, v[..., :4], FULL, "xla")


def test_softmax_stays_in_the_compute_dtype():
  # As in the released code; a float32 softmax would double the memory of the scores.
  jaxpr = jax.make_jaxpr(lambda *a: attend(*a, FULL, "xla"))(*qkv(16, jnp.bfloat16))
  dtypes = [eqn.outvars[0].aval.dtype for eqn in jaxpr.eqns if eqn.primitive.name == "exp"]
  assert dtypes == [jnp.bfloat16]
