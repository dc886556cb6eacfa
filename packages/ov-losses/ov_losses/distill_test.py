"""Distillation losses against float64 formulas of NumPy, and their gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_losses import affinity_divergence, embedding_distance

B, D, E = 12, 7, 5


def rows(seed, size):
  return np.random.default_rng(seed).normal(size=(B, size)) * 3.0


VALID = np.arange(B) % 5 != 2
STUDENT, SAME_SIZE, TEACHER = rows(0, D), rows(1, D), rows(2, E)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def naive_distance(student, teacher, valid):
  return np.mean([1 - s @ t for s, t, ok in zip(unit(student), unit(teacher), valid) if ok])


def naive_affinity(student, teacher, valid, temperature):
  """Return the mean KL divergence, row by row and pair by pair."""
  found = []
  for i in np.flatnonzero(valid):
    others = [j for j in np.flatnonzero(valid) if j != i]

    def probabilities(x, i=i, others=others):
      logits = np.array([unit(x)[i] @ unit(x)[j] for j in others]) / temperature
      return np.exp(logits) / np.exp(logits).sum()

    p, q = probabilities(teacher), probabilities(student)
    found.append((p * np.log(p / q)).sum())
  return np.mean(found)


def numeric_gradient(f, x, step=1e-5):
  gradient = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    shift = np.zeros_like(x)
    shift[index] = step
    gradient[index] = (f(x + shift) - f(x - shift)) / (2 * step)
  return gradient


CASES = {
  "distance": (
    lambda s, t, v: embedding_distance(s, t, valid=v),
    lambda s, v: naive_distance(s, SAME_SIZE, v),
    SAME_SIZE,
  ),
  "affinity": (
    lambda s, t, v: affinity_divergence(s, t, valid=v, temperature=0.2),
    lambda s, v: naive_affinity(s, TEACHER, v, 0.2),
    TEACHER,
  ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("valid", [VALID, np.ones(B, bool)], ids=["some", "all"])
def test_value_and_gradient(case, valid):
  """float32 against float64: a sum of B * E terms of size 1 has an error of about 1e-6."""
  loss, naive, teacher = CASES[case]
  s, t = jnp.float32(STUDENT), jnp.float32(teacher)
  value, gradients = jax.jit(
    jax.value_and_grad(lambda s, t: loss(s, t, jnp.asarray(valid)).loss, (0, 1))
  )(s, t)
  np.testing.assert_allclose(value, naive(STUDENT, valid), rtol=1e-5)
  expected = numeric_gradient(lambda x: naive(x, valid), STUDENT)
  np.testing.assert_allclose(gradients[0], expected, rtol=1e-4, atol=1e-6)
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_array_equal(gradients[1], 0)  # the teacher has no gradient
  assert loss(s, t, jnp.asarray(valid)).num_rows == valid.sum()


@pytest.mark.parametrize("case", CASES)
def test_invalid_rows_have_no_effect(case):
  loss, _, teacher = CASES[case]
  broken = np.where(VALID[:, None], STUDENT, np.nan).astype(np.float32)
  both = np.where(VALID[:, None], teacher, np.inf).astype(np.float32)
  f = jax.value_and_grad(lambda s, t: loss(s, t, VALID).loss)
  expected = f(np.float32(STUDENT), np.float32(teacher))
  chex.assert_trees_all_equal(f(broken, both), expected)
  np.testing.assert_array_equal(expected[1][~VALID], 0)


@pytest.mark.parametrize("case", CASES)
def test_loss_is_zero_without_rows_and_for_equal_embeddings(case):
  loss, _, teacher = CASES[case]
  nothing = jax.value_and_grad(lambda s: loss(s, np.float32(teacher), jnp.zeros(B, bool)).loss)
  value, gradient = nothing(np.float32(STUDENT))
  assert value == 0 and not gradient.any()
  same = loss(2 * np.float32(teacher), np.float32(teacher), jnp.ones(B, bool)).loss
  np.testing.assert_allclose(same, 0, atol=1e-6)  # float32 rounding of a sum of squares


def test_a_zero_vector_has_a_finite_gradient():
  gradient = jax.grad(lambda s: embedding_distance(s, np.float32(SAME_SIZE)).loss)(
    jnp.zeros((B, D))
  )
  assert np.isfinite(gradient).all()


def test_one_row_has_no_affinity():
  valid = np.arange(B) == 3
  assert affinity_divergence(np.float32(STUDENT), np.float32(TEACHER), valid=valid).loss == 0


def test_invalid_temperature():
  with pytest.raises(ValueError, match="temperature=0; expected a positive number"):
    affinity_divergence(np.float32(STUDENT), np.float32(TEACHER), temperature=0)


def test_other_dtypes_are_refused():
  with pytest.raises(ValueError, match="teacher is float16; expected float32 or bfloat16"):
    embedding_distance(np.float32(SAME_SIZE), np.float16(SAME_SIZE))
