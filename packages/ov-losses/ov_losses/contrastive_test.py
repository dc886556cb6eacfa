import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ov_losses import (
  ContrastiveLoss,
  clamp_log_scale,
  contrastive_sigmoid,
  contrastive_softmax,
  similarity_blocks,
  text_groups,
)
from ov_losses.testing.compiled import largest_array
from ov_losses.testing.contrastive_reference import Example, example, reference

KINDS = ("softmax", "sigmoid")
FORMS = ("naive", "gathered", "ring")

# The float32 error of a cosine is about 1e-7: at scale 10, the absolute error of a logit and the
# relative error of a probability are 1e-6. Tolerances are relative to the sum of absolute terms
# (`Reference.terms`), because a sum that cancels keeps the rounding error of its terms.
FLOAT32 = 1e-5
# bfloat16 rounding has a relative error of at most 2^-8. It applies to the gradient of each logit
# before the backward matmuls, and to their results.
BFLOAT16 = 2.0**-7


def loss_of(kind, **options):
  """Return a function of the fields of `Example` -> loss, `ContrastiveLoss`."""

  def loss(image, texts, scale, bias, valid=None, groups=None):
    given = {"valid": valid, "text_groups": groups} | options
    if kind == "softmax":
      out = contrastive_softmax(image, texts, scale, **given)
    else:
      out = contrastive_sigmoid(image, texts, scale, bias, **given)
    return out.loss, out

  return loss


@functools.cache  # compiled once for all tests of the same shape
def value_and_gradients(kind, **options):
  return jax.jit(jax.value_and_grad(loss_of(kind, **options), argnums=(0, 1, 2, 3), has_aux=True))


def run(kind, given, **options):
  """Return `ContrastiveLoss` and the gradients of image, texts, scale and bias."""
  (_, out), grads = value_and_gradients(kind, **options)(*given)
  return out, grads


def assert_near(got, expected_result, terms, share):
  """Assert that the elementwise error is at most `share` of `terms`."""
  error = np.abs(np.asarray(got, np.float64) - expected_result)
  assert np.all(error <= share * terms), np.max(error / np.maximum(terms, 1e-30))


def assert_equals_reference(kind, given, out, grads):
  expected_result = reference(kind, given)
  np.testing.assert_allclose(out.loss, expected_result.loss, rtol=FLOAT32)
  assert out.num_valid == given.valid.sum()
  # Fractions of integers; no two cosines of an example are closer than `contrastive.TIE`.
  np.testing.assert_allclose(out.image_top1, expected_result.image_top1, rtol=1e-6)
  np.testing.assert_allclose(out.text_top1, expected_result.text_top1, rtol=1e-6)
  np.testing.assert_allclose(out.mean_positive, expected_result.mean_positive, atol=1e-6)
  np.testing.assert_allclose(out.mean_negative, expected_result.mean_negative, atol=1e-6)
  rows = BFLOAT16 if given.image.dtype == jnp.bfloat16 else FLOAT32
  shares = (rows, rows, FLOAT32, FLOAT32)
  for name, got, expected, terms, share in zip(
    Example._fields, grads, expected_result.gradients, expected_result.terms, shares, strict=False
  ):
    assert got.dtype == getattr(given, name).dtype
    if kind == "softmax" and name == "bias":
      assert got == 0
      continue
    assert np.abs(expected).max() > 10 * share * np.mean(terms)  # otherwise 0 would pass
    assert_near(got, expected, terms, share)


@pytest.mark.parametrize("batch, num_texts, chunk", [(13, 1, 4), (16, 2, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, form, dtype, batch, num_texts, chunk):
  given = example(batch, num_texts, 24, dtype)
  assert 0 < reference(kind, given).text_top1 < 1
  out, grads = run(kind, given, form=form, chunk=chunk)
  assert_equals_reference(kind, given, out, grads)


@pytest.mark.parametrize("chunk", [1, 100])
def test_any_chunk(chunk):
  given = example(11, 2, 24)
  assert_equals_reference("softmax", given, *run("softmax", given, chunk=chunk))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_defaults(kind, form):
  # One text per image as [B,E]; all rows valid, all texts different.
  given = example(9, 1, 24)._replace(
    valid=np.ones(9, bool), groups=np.arange(9, dtype=np.int32)[None]
  )
  short = (given.image, given.texts[0], given.scale, given.bias)
  out, grads = run(kind, short, form=form)
  assert_equals_reference(kind, given, out, (grads[0], grads[1][None], *grads[2:]))


def test_groups_with_one_axis():
  given = example(9, 1, 24)
  out, grads = run("softmax", given._replace(groups=given.groups[0]))
  assert_equals_reference("softmax", given, out, grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_rows_are_ignored(kind, form):
  given = example(16, 2, 24)
  clean = run(kind, given, form=form, chunk=5)
  filled = given._replace(image=given.image.copy(), texts=given.texts.copy())
  for row, value in zip(np.flatnonzero(~given.valid), (np.nan, np.inf, 1e30), strict=False):
    filled.image[row] = filled.texts[:, row] = value
  assert np.isnan(filled.image).any()
  dirty = run(kind, filled, form=form, chunk=5)
  chex.assert_trees_all_equal(dirty, clean)
  _, (image_grad, texts_grad, *_) = dirty
  assert not image_grad[~given.valid].any() and not texts_grad[:, ~given.valid].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_valid_rows(kind, form):
  given = example(16, 2, 24)._replace(valid=np.zeros(16, bool))
  out, grads = run(kind, given, form=form, chunk=5)
  assert out == ContrastiveLoss(*[0.0] * 6)
  assert all(not np.any(g) for g in grads)  # NaN is truthy


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_negatives(form):
  # The only valid row, or a row whose text equals all others, has no negatives.
  given = example(13, 1, 24)
  alone = given._replace(valid=np.arange(13) == 2)
  copies = given._replace(groups=np.zeros((1, 13), np.int32))
  for given in (alone, copies):
    out, grads = run("softmax", given, form=form, chunk=4)
    assert out.loss == 0 and out.image_top1 == 1 and out.mean_negative == 0
    assert all(not np.any(g) for g in grads)
    out, grads = run("sigmoid", given, form=form, chunk=4)
    expected_result = reference("sigmoid", given)
    np.testing.assert_allclose(out.loss, expected_result.loss, rtol=FLOAT32)
    assert_near(grads[0], expected_result.gradients.image, expected_result.terms.image, FLOAT32)


def test_a_batch_of_one():
  given = example(1, 1, 8)
  out, grads = run("softmax", given)
  assert out.loss == 0 and all(not np.any(g) for g in grads)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["gathered", "ring"])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_temperatures(kind, form, sign, scale):
  # Best and worst matching pairs.
  given = example(13, 1, 24, scale=scale)
  given = given._replace(texts=sign * given.image[None])
  out, grads = run(kind, given, form=form, chunk=4)
  expected_result = reference(kind, given)
  # A cosine is known to 1e-7, the loss to as many logits as it sums, and the gradient by the scale
  # to a cosine: which of two equal ones is the larger is open at scale 1e6.
  np.testing.assert_allclose(out.loss, expected_result.loss, rtol=FLOAT32, atol=4e-6 * scale)
  np.testing.assert_allclose(grads[2], expected_result.gradients.scale, rtol=1e-3, atol=1e-6)
  assert all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize("form", FORMS)
def test_small_loss_is_accurate(form):
  # As logsumexp minus the positive, in float32, both are 32 and their difference is 0.
  given = example(13, 1, 24, scale=32.0)
  given = given._replace(texts=given.image[None])
  out, grads = run("softmax", given, form=form, chunk=4)
  expected_result = reference("softmax", given)
  assert 0 < expected_result.loss < 1e-8
  # exp of a logit that is known to 32 * 1e-7.
  np.testing.assert_allclose(out.loss, expected_result.loss, rtol=1e-4)
  np.testing.assert_allclose(grads[2], expected_result.gradients.scale, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_tie_is_not_a_hit(form, dtype):
  # Identical rows, as in a collapsed model. The summation order of the cosines varies.
  row = example(1, 1, 768, dtype).image
  same = jnp.tile(row, (37, 1))
  out = jax.jit(lambda x: contrastive_softmax(x, x, jnp.float32(100), form=form, chunk=8))(same)
  assert out.image_top1 == 0 and out.text_top1 == 0


def test_only_the_loss_has_gradients():
  given = example(7, 1, 8)

  def others(image, texts, scale, bias):
    _, out = loss_of("sigmoid")(image, texts, scale, bias, given.valid, given.groups)
    return sum(out[1:])

  grads = jax.jit(jax.grad(others, argnums=(0, 1, 2, 3)))(*given[:4])
  assert all(not np.any(g) for g in grads)


@pytest.mark.parametrize(
  ("scale", "limit", "expected"),
  [(7.0, 100.0, 7.0), (101.0, 100.0, 100.0), (0.5, 100.0, 1.0), (3.0, 1.0, 1.0)],
)
def test_clamp_log_scale(scale, limit, expected):
  got = clamp_log_scale(jnp.log(jnp.float32(scale)), limit)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(jnp.exp(got), expected, rtol=1e-5)  # log and exp of float32


@pytest.mark.parametrize("limit", [0, 0.5, -2.0, float("nan"), float("inf")])
def test_invalid_max_scale(limit):
  with pytest.raises(ValueError, match=r"max_scale=.*; expected a finite number of at least 1"):
    clamp_log_scale(jnp.zeros(()), limit)


@pytest.mark.parametrize("start", [90.0, 101.0, 200.0])
def test_a_temperature_above_the_limit_returns_to_the_best_one(start):
  """Pairs so noisy that the best factor is far below 100, whatever the first value is."""
  rng = np.random.default_rng(0)
  unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
  image = unit(rng.normal(size=(32, 8)))
  text = unit(image + 0.9 * rng.normal(size=(32, 8)))
  loss = lambda log_scale: contrastive_softmax(image, text, jnp.exp(log_scale)).loss

  @jax.jit
  def train(log_scale):
    def step(log_scale, _):
      log_scale = log_scale - 0.05 * jnp.sign(jax.grad(loss)(log_scale))
      return clamp_log_scale(log_scale, 100.0), log_scale

    return jax.lax.scan(step, log_scale, length=80)[0]

  factors = jnp.exp(jnp.linspace(0.0, jnp.log(100.0), 200))
  best = factors[jnp.argmin(jax.vmap(lambda s: contrastive_softmax(image, text, s).loss)(factors))]
  assert best < 20
  np.testing.assert_allclose(jnp.exp(train(jnp.log(start))), best, rtol=0.06)  # one step of sign


def test_equal_texts_have_equal_groups_and_others_not(monkeypatch):
  # All texts of 8 tokens out of 3, in a shuffled order, each twice: 21 million pairs of different
  # texts, of which a good hash confuses 0.005.
  texts = np.stack(np.meshgrid(*[np.arange(3)] * 8), -1).reshape(-1, 8).astype(np.int32)
  order = np.random.default_rng(0).permutation(np.tile(np.arange(len(texts)), 2))
  groups = jax.jit(text_groups)(texts[order])
  assert groups.dtype == jnp.int32 and groups.shape == (2 * 3**8,)
  _, ours = np.unique(groups, return_inverse=True)
  same_text = {}
  for text, group in zip(order, ours, strict=True):
    assert same_text.setdefault(text, group) == group
  assert len(set(same_text.values())) == 3**8

  stacked = text_groups(texts[:12].reshape(3, 4, 8))
  np.testing.assert_array_equal(stacked.reshape(-1), text_groups(texts[:12]))
  np.testing.assert_array_equal(text_groups(texts[:12].astype(np.uint8)), stacked.reshape(-1))
  # Without the checks of signatures, as users run it.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=r"ids is float32\[2, 3\]; expected integers"):
    text_groups(jnp.zeros((2, 3)))


def test_equal_texts_are_not_negatives():
  # Rows 0 and 3 share their text: to both, the other is neither positive nor negative.
  given = example(6, 1, 16)._replace(valid=np.ones(6, bool))
  ids = np.arange(6 * 4).reshape(6, 4).astype(np.int32)
  ids[3] = ids[0]
  given.texts[0, 3] = given.texts[0, 0]
  masked, _ = run("softmax", given._replace(groups=np.asarray(text_groups(ids))))
  cosines = np.einsum("ie,je->ij", given.image, given.texts[0]).astype(np.float64)
  logits = given.scale * cosines
  logits[0, 3] = logits[3, 0] = -np.inf
  both = sum(np.logaddexp.reduce(logits, axis) - np.diagonal(logits) for axis in (0, 1))
  np.testing.assert_allclose(masked.loss, both.mean() / 2, rtol=FLOAT32)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"form": "chunked"}, 'form=\'chunked\'; expected "naive", "gathered" or "ring"'),
    ({"chunk": 0}, "chunk=0; expected at least 1"),
    ({"image": np.zeros((3, 8), np.float32)}, r"image has shape \(3, 8\) and texts \(1, 4, 8\)"),
    ({"image": np.zeros((4, 8), np.float16)}, "image is float16 and texts float32"),
    ({"scale": np.ones(4)}, r"scale has shape \(4,\)"),
    ({"valid": np.ones((4, 1), bool)}, r"valid has shape \(4, 1\); expected \[B\] = \(4,\)"),
    ({"groups": np.zeros((2, 4), np.int32)}, r"text_groups is int32\[2, 4\]; expected integers"),
    ({"groups": np.zeros(4, np.float32)}, r"text_groups is float32\[1, 4\]; expected int"),
  ],
)
def test_invalid_arguments(change, message, monkeypatch):
  # Without the checks of signatures, as users run it.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  given = example(4, 1, 8)
  arrays = given._replace(**{k: v for k, v in change.items() if k in Example._fields})
  options = {k: v for k, v in change.items() if k not in Example._fields}
  for kind in KINDS:
    with pytest.raises(ValueError, match=message):
      loss_of(kind, **options)(*arrays)


def test_invalid_mesh_axes():
  mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  given = example(4, 1, 8)
  with pytest.raises(ValueError, match=r"axes=\('data', 'fsdp', 'tensor'\) are not axes .*'rows'"):
    loss_of("softmax", mesh=mesh)(*given)
  # A mesh of one device equals no mesh.
  chex.assert_trees_all_equal(
    run("softmax", given, mesh=mesh, axes=("rows",)), run("softmax", given)
  )


@pytest.mark.parametrize("kind", KINDS)
def test_is_traced_once(kind):
  chex.clear_trace_counter()
  fn = jax.jit(chex.assert_max_traces(loss_of(kind), n=1))
  for seed in range(3):
    fn(*example(6, 1, 8, scale=1.0 + seed, bias=-seed, seed=seed))


def lowered(kind, batch, chunk, form):
  width = 4
  shape = jax.ShapeDtypeStruct
  fn = jax.jit(jax.value_and_grad(loss_of(kind, form=form, chunk=chunk), (0, 1), has_aux=True))
  return fn.lower(
    shape((batch, width), jnp.float32),
    shape((1, batch, width), jnp.float32),
    shape((), jnp.float32),
    shape((), jnp.float32),
    shape((batch,), jnp.bool_),
    shape((1, batch), jnp.int32),
  )


@pytest.mark.parametrize("kind", KINDS)
def test_full_matrix_is_not_materialised(kind):
  batch, chunk = 256, 16
  for form in ("gathered", "ring"):
    assert largest_array(lowered(kind, batch, chunk, form).compile()) == chunk * batch
  assert largest_array(lowered(kind, batch, chunk, "naive").compile()) == batch * batch


@pytest.mark.parametrize("form", ["gathered", "ring"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_does_not_grow_with_the_batch(kind, form):
  # The program, and hence the compile time, is the same for 32 chunks as for 2.
  lines = [len(lowered(kind, batch, 8, form).as_text().splitlines()) for batch in (16, 256)]
  assert lines[0] == lines[1]


def test_chunks_are_equal_and_fit_a_block():
  assert similarity_blocks.num_chunks(100, 64, None) == 1
  assert similarity_blocks.num_chunks(4096, 32768, None) == 4096 * 32768 // 2**22
  assert similarity_blocks.num_chunks(100, 2**30, None) == 13  # 8 rows at least
  assert similarity_blocks.num_chunks(13, 13, 4) == 4
