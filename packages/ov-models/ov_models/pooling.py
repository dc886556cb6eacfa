"""Attention pooling of the tokens of a tower."""

import dataclasses

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ov_models.attention import FULL, attend
from ov_models.blocks import Attention, BlockStyle, Mlp, axes, linear, norm_of, normal
from ov_models.config import TransformerConfig
from ov_models.shapes import Segments
from ov_models.tokens import is_valid


def pool_config(
  config: TransformerConfig, num_heads: int | None = None, mlp_dim: int | None = None
) -> TransformerConfig:
  """Return the config of the attention pooling of a tower.

  It has the activation, the norm and the biases of the tower, but none of its other options.

  Args:
    config: configuration of the tower.
    num_heads: number of attention heads; None for that of the tower.
    mlp_dim: hidden width of the MLP; None for that of the tower.
  """
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(TransformerConfig)}
  fields |= {"num_heads": num_heads or config.num_heads, "mlp_dim": mlp_dim or config.mlp_dim}
  fields |= {"mlp": "plain", "layer_scale": None, "qk_norm": False, "attention_gate": False}
  return TransformerConfig(**fields)


class MapPool(nnx.Module):
  """Attention pooling with one learned query."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d = config.width
    self.dtype = config.compute_dtype
    probe = jax.nn.initializers.xavier_uniform(dtype=jnp.float32)(rngs.params(), (1, d))
    self.probe = nnx.Param(probe[0], **axes(None))
    self.attn = Attention(config, style, rngs=rngs)
    self.norm = norm_of(config, rngs)
    self.mlp = Mlp(config, style, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], segments: Segments | None = None
  ) -> Float[Array, "B D"]:
    """Pool the tokens of x that are not padding; `segments` as in Tokens."""
    valid = None if segments is None else is_valid(segments)
    probe = jnp.broadcast_to(self.probe[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    q, k, v = self.attn.qkv(probe, x)
    pooled = self.attn.output(attend(q, k, v, FULL, "xla", valid))
    return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class AttendPool(nnx.Module):
  """Attention pooling with one learned query, keys and values without bias, and no MLP."""

  def __init__(self, config: TransformerConfig, style: BlockStyle, *, rngs: nnx.Rngs) -> None:
    d, self.dtype, self.num_heads = config.width, config.compute_dtype, config.num_heads
    self.query = nnx.Param(normal(0.02)(rngs.params(), (d,)), **axes(None))
    project = {"bias": config.qkv_bias == "all"}
    self.key = linear(d, d, style.qkv, ("embed", "mlp"), self.dtype, rngs, **project)
    self.value = linear(d, d, style.qkv, ("embed", "mlp"), self.dtype, rngs, **project)
    self.out = linear(d, d, style.out, ("mlp", "embed"), self.dtype, rngs)

  def __call__(
    self, x: Float[Array, "B T D"], segments: Segments | None = None
  ) -> Float[Array, "B D"]:
    """Pool the tokens of x that are not padding; `segments` as in Tokens."""
    valid = None if segments is None else is_valid(segments)
    q = jnp.broadcast_to(self.query[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    q, k, v = (
      rearrange(a, "b t (n h) -> b t n h", n=self.num_heads)
      for a in (q, self.key(x), self.value(x))
    )
    return self.out(rearrange(attend(q, k, v, FULL, "xla", valid), "b t n h -> b t (n h)"))[:, 0]
