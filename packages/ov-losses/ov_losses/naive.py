"""The caption loss with all logits held at once: the yardstick of tests and memory report."""

import jax
import jax.numpy as jnp


def naive_loss(
  hidden: jax.Array,  # [B,T,D]
  head: jax.Array,  # [D,V]
  labels: jax.Array,  # [B,T]
  mask: jax.Array,  # [B,T]
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> jax.Array:
  """Scalar masked mean cross-entropy through [B,T,V] float32 logits and automatic gradients."""
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
