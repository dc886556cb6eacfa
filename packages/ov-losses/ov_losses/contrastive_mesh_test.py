"""Tests of the contrastive losses on 8 devices: values, gradients, memory and collectives."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ov_losses import contrastive_sigmoid, contrastive_softmax
from ov_losses.testing.compiled import largest_array
from ov_losses.testing.contrastive_reference import Example, example, reference

AXES = ("data", "fsdp", "tensor")
KINDS = ("softmax", "sigmoid")
FORMS = ("naive", "gathered", "ring")

# As in contrastive_test: float32 rounding of a cosine at scale 10 and two bfloat16 roundings,
# relative to the absolute terms of each sum.
FLOAT32 = 1e-5
BFLOAT16 = 2.0**-7


def make_mesh(shape):
  assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def value_and_gradients(kind, form, mesh, axes=AXES, chunk=None, given_over=None):
  """Return a jitted loss and its gradients for an `Example` sharded over `given_over`."""

  def loss(image, texts, scale, bias, valid, groups):
    options = dict(valid=valid, text_groups=groups, form=form, mesh=mesh, axes=axes, chunk=chunk)
    if kind == "softmax":
      out = contrastive_softmax(image, texts, scale, **options)
    else:
      out = contrastive_sigmoid(image, texts, scale, bias, **options)
    return out.loss, out

  over = given_over or axes
  places = Example(
    *(NamedSharding(mesh, s) for s in (P(over), P(None, over), P(), P())),
    NamedSharding(mesh, P(over)),
    NamedSharding(mesh, P(None, over)),
  )
  return jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), in_shardings=tuple(places)
  )


def shapes(given):
  return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "shape, axes, batch, num_texts, dtype",
  [
    ((8, 1, 1), AXES, 40, 1, jnp.float32),
    ((2, 2, 2), AXES, 40, 2, jnp.float32),  # 5 rows on each device, in chunks of 3
    ((2, 2, 2), ("data", "fsdp"), 20, 1, jnp.bfloat16),  # every row on two devices
  ],
  ids=["8", "2x2x2", "rows-on-4-of-2x2x2-bfloat16"],
)
def test_equals_the_formula(shape, axes, batch, num_texts, dtype, kind, form):
  mesh = make_mesh(shape)
  given = example(batch, num_texts, 24, dtype)
  (_, out), grads = value_and_gradients(kind, form, mesh, axes, chunk=3)(*given)
  expected_result = reference(kind, given)
  assert 0 < expected_result.image_top1 < 1
  np.testing.assert_allclose(out.loss, expected_result.loss, rtol=FLOAT32)
  for name in ("image_top1", "text_top1", "mean_positive", "mean_negative"):
    np.testing.assert_allclose(getattr(out, name), getattr(expected_result, name), atol=1e-6)
  assert out.num_valid == given.valid.sum()
  rows = BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32
  for got, expected, terms, share in zip(
    grads,
    expected_result.gradients,
    expected_result.terms,
    (rows, rows, FLOAT32, FLOAT32),
    strict=True,
  ):
    if kind == "softmax" and got is grads[3]:
      assert got == 0  # the softmax has no bias
      continue
    error = np.abs(np.asarray(got, np.float64) - expected)
    assert np.all(error <= share * terms), np.max(error / np.maximum(terms, 1e-30))
  if form != "naive":
    assert grads[0].sharding.is_equivalent_to(NamedSharding(mesh, P(axes)), 2)
    assert grads[1].sharding.is_equivalent_to(NamedSharding(mesh, P(None, axes)), 3)


@pytest.mark.parametrize("form", ["gathered", "ring"])
def test_other_input_shardings_and_invalid_rows(form):
  # Inputs are sharded over one axis only; all rows of one device are invalid and contain NaN.
  mesh = make_mesh((2, 2, 2))
  given = example(40, 2, 24)
  given.valid[5:10] = False
  given.image[~given.valid] = np.nan
  given.texts[:, ~given.valid] = np.nan
  fn = value_and_gradients("softmax", form, mesh, chunk=3, given_over=("data",))
  (_, out), grads = fn(*given)
  expected_result = reference("softmax", given)
  np.testing.assert_allclose(out.loss, expected_result.loss, rtol=FLOAT32)
  for got, expected, terms in zip(
    grads[:3], expected_result.gradients[:3], expected_result.terms[:3], strict=True
  ):
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= FLOAT32 * terms)


def test_indivisible_batch():
  given = example(12, 1, 8)
  with pytest.raises(ValueError, match=r"batch of 12 rows is not a multiple of 8.* multiple is 16"):
    contrastive_softmax(*given[:3], form="ring", mesh=make_mesh((2, 2, 2)))


def counts(compiled):
  """Return the result shapes of each kind of collective."""
  found = {}
  for shape, name in re.findall(
    r"= \(?(\w+\[[\d,]*\])\S* (all-gather|reduce-scatter|collective-permute)\(",
    compiled.as_text(),
  ):
    found.setdefault(name, []).append(shape)
  return found


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_collectives_per_device(kind):
  mesh = make_mesh((8, 1, 1))
  batch, width, chunk = 512, 4, 8
  given = example(batch, 1, width)
  compile_ = lambda form: value_and_gradients(kind, form, mesh, chunk=chunk).lower(*shapes(given))
  programs = {form: compile_(form).compile() for form in FORMS}
  texts, own_texts = f"f32[1,{batch},{width}]", f"f32[1,{batch // 8},{width}]"

  # Naive: the rows of one device against all texts. Gathered: one chunk of them at a time. Ring:
  # against the texts of one device.
  assert largest_array(programs["naive"]) >= batch // 8 * batch
  assert largest_array(programs["gathered"]) == chunk * batch
  assert largest_array(programs["ring"]) == chunk * batch // 8

  gathered, ring = counts(programs["gathered"]), counts(programs["ring"])
  assert texts in gathered["all-gather"] and own_texts in gathered["reduce-scatter"]
  assert "collective-permute" not in gathered
  assert own_texts in ring["collective-permute"]
  assert "all-gather" not in ring and "reduce-scatter" not in ring
