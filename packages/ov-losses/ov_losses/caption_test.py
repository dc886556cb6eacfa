import pathlib

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import ov_losses
from ov_losses import caption_cross_entropy, sequence_log_likelihood, shift_left
from ov_losses.testing import naive

GOLDEN = pathlib.Path(__file__).parent / "testdata" / "openvision2_caption_loss.npz"

# Different order of float32 sums of a few thousand terms: a few ulps of
# 6e-8 grow by about sqrt(terms).
RTOL = 1e-5

# Compiled once for all tests of the same shape.
caption_loss = jax.jit(caption_cross_entropy, static_argnames=("label_smoothing", "z_loss", "tile"))
log_likelihood = jax.jit(sequence_log_likelihood, static_argnames=("tile",))
naive_loss = jax.jit(naive.naive_loss, static_argnums=(4, 5))


def example(b=3, t=13, d=24, v=101, dtype=jnp.float32, scale=1.0, seed=0):
  """Return hidden, head, labels and mask; logits are of order `scale`."""
  rng = np.random.default_rng(seed)
  hidden = (scale * rng.standard_normal((b, t, d))).astype(dtype)
  head = (rng.standard_normal((d, v)) / d**0.5).astype(np.float32)
  labels = rng.integers(0, v, (b, t), dtype=np.int32)
  mask = rng.random((b, t)) < 0.7
  mask[0, 0] = True
  return hidden, head, labels, mask


def at(array, index, value):
  """Return a copy of a NumPy array with `value` at `index`."""
  array = array.copy()
  array[index] = value
  return array


def value_and_grads(fn, hidden, head):
  return jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(hidden, head)


@pytest.mark.parametrize(
  "t, tile, smoothing, z_loss",
  [
    (1, None, 0.1, 1e-2),
    (5, 2, 0.0, 0.0),
    (13, 5, 0.1, 0.0),
    (13, 13, 0.0, 1e-2),
    (13, 64, 0.1, 1e-2),  # a tile wider than the caption
    (37, None, 0.0, 0.0),
  ],
)
def test_equals_naive_in_float32(t, tile, smoothing, z_loss):
  hidden, head, labels, mask = example(t=t)

  def tiled(hidden, head):
    return caption_cross_entropy(
      hidden, head, labels, mask, label_smoothing=smoothing, z_loss=z_loss, tile=tile
    ).loss

  def naive_value(hidden, head):
    return naive.naive_loss(hidden, head, labels, mask, smoothing, z_loss)

  loss, grads = value_and_grads(tiled, hidden, head)
  expected, expected_grads = value_and_grads(naive_value, hidden, head)
  np.testing.assert_allclose(loss, expected, rtol=RTOL)
  for got, want in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(
  "scale, smoothing, z_loss",
  [(1.0, 0.1, 1e-2), (16.0, 0.0, 0.0), (16.0, 0.1, 1e-2)],  # 16 reaches |logit| > 40
)
def test_bfloat16_error_is_the_rounding_of_dlogits(scale, smoothing, z_loss):
  hidden, head, labels, mask = example(dtype=jnp.bfloat16, scale=scale)
  head = head.astype(jnp.bfloat16)  # exact in float32, the dtype of the reference
  hidden32, head32 = hidden.astype(np.float32), head.astype(np.float32)
  logits = hidden32 @ head32
  if scale > 1:
    assert np.abs(logits).max() > 40

  def tiled(hidden, head):
    return caption_cross_entropy(
      hidden, head, labels, mask, label_smoothing=smoothing, z_loss=z_loss, tile=5
    ).loss

  def from_logits(logits):  # identity head: returns the gradient of the logits
    return naive.naive_loss(logits, jnp.eye(101), labels, mask, smoothing, z_loss)

  loss, (hidden_grad, head_grad) = value_and_grads(tiled, hidden, head)
  assert (loss.dtype, hidden_grad.dtype, head_grad.dtype) == (jnp.float32, hidden.dtype, head.dtype)
  expected, dlogits = jax.jit(jax.value_and_grad(from_logits))(logits)
  dlogits = np.asarray(dlogits)
  np.testing.assert_allclose(loss, expected, rtol=RTOL)

  # bfloat16 rounding has a relative error of at most 2^-8. It applies to dlogits and to the result
  # of each backward matmul. The relative float32 error of a probability is a few |logit| * 2^-24:
  # 2e-5 at |logit| 60.
  unit = 2.0**-8
  softmax = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
  noise = 2e-5 * softmax * mask[..., None] / mask.sum()
  dlogits_error = unit * np.abs(dlogits) + noise * (1 + 2 * z_loss * np.abs(logits).max())
  for got, want, bound in (
    (hidden_grad, dlogits @ head32.T, dlogits_error @ np.abs(head32).T),
    (
      head_grad,
      np.einsum("btd,btv->dv", hidden32, dlogits),
      np.einsum("btd,btv->dv", np.abs(hidden32), dlogits_error),
    ),
  ):
    error = np.abs(np.asarray(got, np.float32) - want)
    assert np.all(error <= unit * np.abs(want) + bound)
    # Rounding errors have random signs, so the norm of the error is far below the bound.
    assert np.linalg.norm(error) < unit * np.linalg.norm(want)


def test_large_logits_do_not_cancel():
  # One logit of 1024 and 100 logits of 1016, all exact: nll = log1p(100 exp(-8)) = 0.033. Computing
  # lse - logit would have the float32 spacing at 1024 as error: 1.2e-4, or 0.4%.
  head = jnp.full((1, 101), 1016.0).at[0, 0].set(1024.0)
  result = caption_cross_entropy(
    jnp.ones((1, 1, 1)), head, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
  )
  np.testing.assert_allclose(result.nll, np.log1p(100 * np.exp(-8.0)), rtol=RTOL)


def test_counts_and_unsmoothed_nll():
  hidden, head, labels, mask = example()
  logits = hidden @ head
  labels[:, ::2] = np.argmax(logits, axis=-1)[:, ::2]
  result = caption_loss(hidden, head, labels, mask, label_smoothing=0.1, z_loss=1e-2)
  assert result.num_tokens == mask.sum()
  assert result.num_correct == np.sum((np.argmax(logits, -1) == labels) & mask)
  np.testing.assert_allclose(result.nll, naive_loss(hidden, head, labels, mask), rtol=RTOL)
  assert result.loss > result.nll
  chex.assert_type(list(result), jnp.float32)
  chex.assert_shape(list(result), ())


def test_tie_is_not_correct():
  hidden, head, labels, mask = example()
  assert caption_loss(hidden * 0, head, labels, mask).num_correct == 0


def test_mask_weights_count():
  hidden, head, labels, _ = example()
  weights = np.random.default_rng(7).random(labels.shape, dtype=np.float32)
  result = caption_loss(hidden, head, labels, weights)
  expected = naive_loss(hidden, head, labels, weights)
  np.testing.assert_allclose(result.loss, expected, rtol=RTOL)
  np.testing.assert_allclose(result.num_tokens, weights.sum(), rtol=RTOL)


def test_masked_row_is_ignored():
  hidden, head, labels, mask = example(b=4)
  mask[2] = False

  def loss(hidden, head):
    return caption_cross_entropy(hidden, head, labels, mask, tile=5).loss

  value, (hidden_grad, head_grad) = value_and_grads(loss, hidden, head)
  keep = np.array([0, 1, 3])
  without = caption_loss(hidden[keep], head, labels[keep], mask[keep], tile=5)
  np.testing.assert_allclose(value, without.loss, rtol=RTOL)
  assert not np.any(hidden_grad[2])
  assert np.all(np.isfinite(head_grad))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_without_tokens_gives_zero_and_zero_gradients(dtype):
  hidden, head, labels, mask = example(dtype=dtype, scale=50.0)

  def loss(hidden, head):
    return caption_cross_entropy(
      hidden, head, labels, np.zeros_like(mask), label_smoothing=0.1, z_loss=1e-2
    ).loss

  value, grads = value_and_grads(loss, hidden, head)
  assert value == 0
  assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize("bad", [-100, -1, 101, 2**31 - 1])
def test_label_outside_the_vocabulary(bad):
  hidden, head, labels, mask = example()
  labels[1, 3] = bad
  masked = caption_loss(hidden, head, labels, at(mask, (1, 3), False))
  assert np.isfinite(masked.loss)
  counted = caption_loss(hidden, head, labels, at(mask, (1, 3), True))
  assert np.isnan(counted.loss) and np.isnan(counted.nll)
  scores = log_likelihood(hidden, head, labels, at(mask, (1, 3), True))
  assert np.isnan(scores[1]) and np.all(np.isfinite(scores[np.array([0, 2])]))


def test_gradient_of_log_likelihood():
  hidden, head, labels, mask = example()

  def score(hidden, head):
    return -jnp.sum(sequence_log_likelihood(hidden, head, labels, mask, tile=4)) / mask.sum()

  def naive_value(hidden, head):
    return naive.naive_loss(hidden, head, labels, mask)

  _, expected = value_and_grads(naive_value, hidden, head)
  _, grads = value_and_grads(score, hidden, head)
  for got, want in zip(grads, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=1e-6 * np.abs(want).max())


def test_only_the_loss_has_a_gradient():
  hidden, head, labels, mask = example()

  def figures(hidden, head):
    return sum(caption_cross_entropy(hidden, head, labels, mask)[1:])

  value, grads = value_and_grads(figures, hidden, head)
  assert value > 0 and not any(np.any(g) for g in grads)


def test_gradient_scales_with_the_cotangent():
  hidden, head, labels, mask = example()

  def of(make):
    return value_and_grads(
      lambda h, w: make(caption_cross_entropy(h, w, labels, mask, tile=5).loss), hidden, head
    )

  loss, grads = of(lambda loss: loss)
  _, squared = of(jnp.square)
  for once, scaled in zip(grads, squared, strict=True):
    np.testing.assert_allclose(scaled, 2 * loss * once, rtol=RTOL, atol=1e-12)


def test_sequence_log_likelihood():
  hidden, head, labels, mask = example()
  mask[1] = False
  log_probs = jax.nn.log_softmax(hidden @ head)
  picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
  expected = jnp.sum(picked * mask, axis=1)
  got = log_likelihood(hidden, head, labels, mask, tile=5)
  np.testing.assert_allclose(got, expected, rtol=RTOL)
  assert got[1] == 0


def test_shift_left(monkeypatch):
  ids = np.array([[1, 7, 8, 2, 0, 0], [1, 5, 5, 5, 5, 5]], np.int32)
  targets, mask = shift_left(ids, pad_id=0)
  np.testing.assert_array_equal(targets, [[7, 8, 2, 0, 0, 0], [5, 5, 5, 5, 5, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
  assert targets.dtype == ids.dtype and mask.dtype == bool
  # Without the checks of signatures, as users run it.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=r"ids is int32\[6\]; expected integers \[B, T\]"):
    shift_left(ids[0], pad_id=0)


def test_openvision2_golden_loss():
  golden = np.load(GOLDEN)
  targets = jnp.asarray(golden["labels"][:, 1:])
  logits = jnp.asarray(golden["logits"])
  result = caption_loss(logits, jnp.eye(logits.shape[-1]), targets, targets != 0)
  np.testing.assert_allclose(result.loss, golden["caption_loss"], rtol=1e-6)


def test_one_trace_for_many_batches():
  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(hidden, head, labels, mask):
    return jax.grad(lambda h: caption_cross_entropy(h, head, labels, mask).loss)(hidden)

  for seed in range(3):
    step(*example(seed=seed))


def test_inside_remat_and_scan():
  hidden, head, labels, mask = example(b=4)

  def micro(total, xs):
    h, y, m = xs
    return total + caption_cross_entropy(h, head, y, m).loss, None

  def loss(hidden):
    pairs = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (hidden, labels, mask))
    return jax.lax.scan(jax.checkpoint(micro), 0.0, pairs)[0]

  def naive_value(hidden):
    return sum(
      naive.naive_loss(hidden[i : i + 2], head, labels[i : i + 2], mask[i : i + 2]) for i in (0, 2)
    )

  got, want = jax.jit(jax.grad(loss))(hidden), jax.grad(naive_value)(hidden)
  np.testing.assert_allclose(got, want, rtol=RTOL, atol=1e-6 * np.abs(want).max())


def equations(jaxpr):
  """Return all equations of a jaxpr, including inner jaxprs."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
      if is_jaxpr(inner):
        yield from equations(getattr(inner, "jaxpr", inner))


def is_jaxpr(x):
  return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_matmuls_and_shapes_of_the_traced_program():
  hidden, head, labels, mask = example(t=32, dtype=jnp.bfloat16)

  def loss(hidden, head):
    return caption_cross_entropy(hidden, head, labels, mask).loss

  program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
  found = list(equations(program.jaxpr))
  products = [e for e in found if e.primitive.name == "dot_general"]
  assert len(products) == 3  # logits, gradient of hidden, gradient of head
  for product in products:
    assert [x.aval.dtype for x in product.invars] == [jnp.bfloat16, jnp.bfloat16]
    assert product.outvars[0].aval.dtype == jnp.float32
  largest = max(x.aval.size for e in found for x in e.outvars)
  assert largest == 3 * 16 * 101  # one tile of logits, half of [B,T,V]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_memory_is_below_the_naive_loss(dtype):
  shapes = (
    jax.ShapeDtypeStruct((8, 127, 128), dtype),
    jax.ShapeDtypeStruct((128, 8000), jnp.float32),
    jax.ShapeDtypeStruct((8, 127), jnp.int32),
    jax.ShapeDtypeStruct((8, 127), jnp.bool_),
  )

  def temporary_bytes(loss):
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 8 * 127 * 8000 * 4
  naive_bytes = temporary_bytes(naive.naive_loss)
  tiled_bytes = temporary_bytes(lambda *given: caption_cross_entropy(*given).loss)
  assert naive_bytes > logits
  # One tile of logits and of their gradient (1/8 each) and two head gradients (1/8): the total must
  # be below one [B,T,V] float32 array.
  assert tiled_bytes < 0.75 * logits
  assert tiled_bytes < 0.4 * naive_bytes


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(head=jnp.zeros((25, 101))), r"\(3, 13, 24\) and head \(25, 101\); expected \[B,T,D\]"),
    (dict(labels=jnp.zeros((3, 12), jnp.int32), mask=jnp.ones((3, 12))), r"labels has shape"),
    (dict(labels=jnp.zeros((3, 13))), "labels has dtype float32; expected an integer"),
    (dict(mask=jnp.ones((3,))), r"mask has shape \(3,\); expected the shape of labels, \(3, 13\)"),
    (dict(hidden=jnp.zeros((3, 13, 24), jnp.float16)), "hidden has dtype float16; expected"),
    (dict(head=jnp.zeros((24, 101), jnp.int8)), "head has dtype int8"),
    (dict(label_smoothing=1.0), r"label_smoothing=1.0 is outside \[0, 1\)"),
    (dict(z_loss=-1.0), "z_loss=-1.0; expected 0"),
    (dict(z_loss=float("nan")), "z_loss=nan; expected 0"),
    (dict(tile=0), "tile=0; expected at least 1"),
    (dict(batch_shards=2), "batch_shards=2 does not divide the batch of 3"),
  ],
)
def test_invalid_arguments(change, message, monkeypatch):
  # Without the checks of signatures, as users run it.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  hidden, head, labels, mask = example()
  arguments = dict(hidden=hidden, head=head, labels=labels, mask=mask) | change
  with pytest.raises(ValueError, match=message):
    ov_losses.caption_cross_entropy(**arguments)
