"""Caption loss that materialises all logits: the reference of the tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ov_losses.caption import Weights
from ov_losses.shapes import AnyArray


def naive_loss(
  hidden: Float[AnyArray, "B T D"],
  head: Float[AnyArray, "D V"],
  labels: Integer[AnyArray, "B T"],
  mask: Weights,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> Float[Array, ""]:
  """Compute the masked mean cross-entropy from all float32 logits, with automatic gradients."""
  logits = jnp.einsum(
    "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
  lse = jax.nn.logsumexp(logits, axis=-1)
  label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  loss = (1.0 - label_smoothing) * (lse - label_logit)
  if label_smoothing:
    loss += label_smoothing * (lse - jnp.mean(logits, axis=-1))
  if z_loss:
    loss += z_loss * jnp.square(lse)
  return jnp.sum(loss * mask) / (jnp.sum(mask) + 1e-8)
