"""Distillation of image embeddings from a frozen teacher.

Two losses between the embeddings of a student and of a teacher for the same B images:

  embedding_distance   mean_i (1 - s_i . t_i), both of unit length
  affinity_divergence  mean_i KL(softmax_j(t_i . t_j / tau) || softmax_j(s_i . s_j / tau)), j != i

The first is the feature distillation of CLIP-KD (Yang et al. 2023, https://arxiv.org/abs/2307.12732)
on unit vectors: |s - t|^2 = 2 (1 - s . t). The second is the affinity mimicking of TinyCLIP (Wu et
al. 2023, https://arxiv.org/abs/2309.12314) between images instead of images and texts. It compares
similarities only, so the two embeddings may have different sizes.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ov_losses import contexts
from ov_losses.shapes import AnyArray

_LEAST = 1e-16  # smallest squared norm; keeps the gradient of a zero vector finite
_MASKED = -1e30  # logit of an excluded pair


class DistillationLoss(NamedTuple):
  """Loss and metrics of a batch: float32 scalars. Only `loss` is differentiable."""

  loss: Float[Array, ""]  # mean over the valid rows
  num_rows: Float[Array, ""]  # number of valid rows


def embedding_distance(
  student: Float[AnyArray, "B E"],
  teacher: Float[AnyArray, "B E"],
  *,
  valid: Bool[AnyArray, " B"] | None = None,
) -> DistillationLoss:
  """Compute the mean cosine distance of student and teacher embeddings, in [0, 2].

  The sums are float32. A batch without valid rows has loss 0 and zero gradients.

  Args:
    student: embeddings of the student, of any length.
    teacher: embeddings of the teacher for the same images, of any length; no gradient.
    valid: rows of the mean; None for all. Other rows have zero gradients.

  Raises:
    ValueError: if a dtype is not float32 or bfloat16.
  """
  student, teacher, rows = _arrays(student, teacher, valid)
  return contexts.run(_embedding_distance, student, teacher, rows)


def affinity_divergence(
  student: Float[AnyArray, "B D"],
  teacher: Float[AnyArray, "B E"],
  *,
  valid: Bool[AnyArray, " B"] | None = None,
  temperature: float = 0.1,
) -> DistillationLoss:
  """Compute the mean divergence of the student's similarities of images from the teacher's.

  The matrices [B, B] are float32. A batch of less than two valid rows has loss 0.

  Args:
    student: embeddings of the student, of any length.
    teacher: embeddings of the teacher for the same images, of any length and size; no gradient.
    valid: rows that are compared; None for all. Other rows have zero gradients.
    temperature: tau, divides the cosine similarities.

  Raises:
    ValueError: if the temperature is not positive and finite, or a dtype is not float32 or
      bfloat16.
  """
  if not 0 < temperature < math.inf:
    raise ValueError(f"temperature={temperature}; expected a positive number such as 0.1.")
  student, teacher, rows = _arrays(student, teacher, valid)
  compute = functools.partial(_affinity_divergence, temperature=float(temperature))
  return contexts.run(compute, student, teacher, rows)


def _arrays(student: AnyArray, teacher: AnyArray, valid: AnyArray | None) -> tuple[jax.Array, ...]:
  """Return JAX arrays, with `valid` True by default; raise ValueError for other dtypes."""
  student, teacher = map(jnp.asarray, (student, teacher))
  for name, array in (("student", student), ("teacher", teacher)):
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      raise ValueError(f"{name} is {array.dtype}; expected float32 or bfloat16.")
  return student, teacher, jnp.ones(len(student), bool) if valid is None else jnp.asarray(valid)


def _embedding_distance(
  student: jax.Array, teacher: jax.Array, valid: jax.Array
) -> DistillationLoss:
  teacher = jax.lax.stop_gradient(_unit(teacher, valid))
  distance = 1.0 - (_unit(student, valid) * teacher).sum(-1)
  count = valid.sum().astype(jnp.float32)
  return DistillationLoss((distance * valid).sum() / jnp.maximum(count, 1.0), count)


def _affinity_divergence(
  student: jax.Array, teacher: jax.Array, valid: jax.Array, *, temperature: float
) -> DistillationLoss:
  pairs = valid[:, None] & valid[None] & ~jnp.eye(len(valid), dtype=bool)

  def log_softmax(x: jax.Array) -> jax.Array:
    unit = _unit(x, valid)
    similar = jnp.matmul(unit, unit.T, precision="highest") / temperature
    return jax.nn.log_softmax(jnp.where(pairs, similar, _MASKED))

  wanted = jax.lax.stop_gradient(log_softmax(teacher))
  terms = jnp.where(pairs, jnp.exp(wanted) * (wanted - log_softmax(student)), 0.0)
  count = valid.sum().astype(jnp.float32)
  return DistillationLoss(terms.sum() / jnp.maximum(count, 1.0), count)


def _unit(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Return float32 rows of unit length; invalid rows, which may contain NaN, are 0."""
  x = jnp.where(valid[:, None], x.astype(jnp.float32), 0.0)
  return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), _LEAST))
