"""Attention implementations agree, or refuse."""

from functools import partial

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
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
def test_long_texts_make_few_scores_that_no_query_sees(mask, scores, padded):
  q, k, v = qkv(300)
  allowed = mask.array(300)[None, None]
  if padded:  # every query sees a token
    mask = Mask(mask.kind, mask.prefix, keys=jnp.arange(300) < np.array([[300], [1]]))
    allowed = allowed & np.asarray(mask.keys)[:, None, None, :]

  def by_rows(q, k, v):
    return attend(q, k, v, mask, "xla")

  def at_once(q, k, v):
    return attention.attend_xla(q, k, v, jnp.asarray(allowed))

  def value_and_gradients(form):
    return jax.jit(jax.value_and_grad(lambda *a: (form(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

  # float32 sums of up to 300 terms in another order.
  for got, want in zip(*map(jax.tree.leaves, map(value_and_gradients, (by_rows, at_once)))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
  products = [e for e in jax.make_jaxpr(by_rows)(q, k, v).eqns if e.primitive.name == "dot_general"]
  assert [e.outvars[0].aval.shape[2:] for e in products[::2]] == scores


@pytest.mark.parametrize(
  ("mask", "length"), [(FULL, 9), (Mask("causal"), 130), (Mask("prefix", 5), 9)]
)
def test_tpu_kernel_interpreted(mask, length, monkeypatch):
  # The kernel itself, run by the interpreter: values, gradients, and the padding to 128 around it.
  interpreted = partial(splash_attention.make_splash_mha_single_device, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
  monkeypatch.setattr(attention, "_platform", lambda: "tpu")

  def run(implementation, *args):
    def total(q, k, v):
      out = attend(q, k, v, mask, implementation)
      return (out**2).sum(), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*args)

  with jax.default_matmul_precision("highest"):
    (_, out), grads = run("tpu", *qkv(length))
    (_, expected), expected_grads = run("xla", *qkv(length))
  assert np.isfinite(out).all()
  # float32, sums of up to 130 terms in another order.
  np.testing.assert_allclose(out, expected, atol=2e-6)
  for ours, theirs in zip(grads, expected_grads):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("length", [9, 130])
def test_tpu_kernel_lowers_for_tpu(length, monkeypatch):
  monkeypatch.setattr(attention, "_platform", lambda: "tpu")
  loss = lambda q, k, v: attend(q, k, v, Mask("prefix", 5), "tpu").astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss)).trace(*qkv(length, jnp.bfloat16))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") >= 2  # forward and backward


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_cudnn_gets_the_right_arguments(mask, monkeypatch):
  # Without a GPU the kernel cannot run: the same call through XLA must give the same result.
  kernel = jax.nn.dot_product_attention
  seen = []

  def on_xla(q, k, v, implementation, **kwargs):
    seen.append((implementation, q.shape[1], kwargs.get("is_causal"), "mask" in kwargs))
    return kernel(q, k, v, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
  monkeypatch.setattr(attention, "_platform", lambda: "gpu")
  q, k, v = qkv(9)
  out = attend(q, k, v, mask, "cudnn")
  np.testing.assert_allclose(out, attend(q, k, v, mask, "xla"), atol=1e-5)
  prefix = mask.kind == "prefix"
  assert seen == [("cudnn", 10 if prefix else 9, None if prefix else mask.kind == "causal", prefix)]


@pytest.mark.parametrize(("implementation", "home"), [("cudnn", "gpu"), ("tpu", "tpu")])
def test_refused_elsewhere(implementation, home):
  message = f"attention='{implementation}' runs on {home} only.*cpu; set attention='xla'"
  with pytest.raises(ValueError, match=message):
    attend(*qkv(9), FULL, implementation)


def test_softmax_stays_in_the_compute_dtype():
  # As the published models were trained; a float32 softmax would double the memory of the scores.
  jaxpr = jax.make_jaxpr(lambda *a: attend(*a, FULL, "xla"))(*qkv(16, jnp.bfloat16))
  dtypes = [eqn.outvars[0].aval.dtype for eqn in jaxpr.eqns if eqn.primitive.name == "exp"]
  assert dtypes == [jnp.bfloat16]
