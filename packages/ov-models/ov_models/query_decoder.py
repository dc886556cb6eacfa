"""The caption decoder of the first OpenVision: learned queries over [image | text | queries].

OpenVision: https://arxiv.org/abs/2505.04601.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models.attention import Mask
from ov_models.blocks import axes, layer_norm, linear, normal, run_blocks, stack_blocks
from ov_models.config import TransformerConfig, from_fields, variant_sizes
from ov_models.contexts import any_mesh
from ov_models.decoder import DECODER_VARIANTS, text_style
from ov_models.partition import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryDecoderConfig(TransformerConfig):
  """A caption decoder that is never shown the caption.

  Attributes:
    vocab_size: V, of the head.
    num_queries: Q, caption tokens that it writes at once.
  """

  vocab_size: int
  num_queries: int = 128

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_positive("vocab_size")
    self._check_positive("num_queries")

  @classmethod
  def from_name(
    cls, name: str, vocab_size: int = 32000, num_queries: int = 128, **overrides: Any
  ) -> "QueryDecoderConfig":
    """A published size, e.g. "L"; `overrides` set any field."""
    sizes: dict[str, Any] = variant_sizes("decoder", name, DECODER_VARIANTS)
    sizes |= {"vocab_size": vocab_size, "num_queries": num_queries}
    return from_fields(cls, sizes | overrides)


class QueryDecoder(nnx.Module):
  """Each caption token is read off one learned query.

  The sequence is [image | text | queries]. Image and text see each other and no query; query i
  sees both and queries 0..i. There are no positions: a query is its own, and image and text carry
  those of their towers. Between two words passes only what the states of the queries hold, so this
  decoder writes a caption less well than `Decoder`, and cannot generate token by token.

  Args:
    config: sizes.
    image_width: E, of the image tokens.
    text_width: W, of the text tokens; None for a decoder that sees the image only.
  """

  def __init__(
    self,
    config: QueryDecoderConfig,
    image_width: int,
    text_width: int | None = None,
    *,
    rngs: nnx.Rngs,
  ) -> None:
    self.config = config
    d, v, f32 = config.width, config.vocab_size, jnp.dtype("float32")

    def project(width: int) -> nnx.Linear:
      return linear(width, d, normal(width**-0.5), ("embed", None), f32, rngs, bias=False)

    self.image_proj = project(image_width)
    self.text_proj = None if text_width is None else project(text_width)
    queries = normal(1.0)(rngs.params(), (config.num_queries, d))
    self.queries = nnx.Param(queries, **axes(None, "embed"))
    self.blocks = stack_blocks(config, text_style(d), rngs=rngs)
    self.norm = layer_norm(d, f32, rngs)
    self.head = linear(d, v, normal(d**-0.5), ("embed", "vocab"), f32, rngs, bias=False)

  @any_mesh()
  def __call__(self, image_tokens: jax.Array, text_tokens: jax.Array | None = None) -> jax.Array:
    """Hidden states that predict the caption.

    Args:
      image_tokens: [B, K, E] of the vision tower.
      text_tokens: [B, T, W] of the text tower; None exactly if the decoder has no text_width.

    Returns:
      float32 [B, Q, D]; row i predicts caption token i.

    Raises:
      ValueError: text tokens are missing, or given to a decoder without a projection for them.
    """
    dtype = self.config.compute_dtype
    parts = [self.image_proj(image_tokens.astype(jnp.float32))]
    if self.text_proj is not None:
      if text_tokens is None:
        raise ValueError(
          "text_tokens=None, but this decoder reads a text beside the image; pass text_tokens "
          f"[B, T, {self.text_proj.in_features}], or build it with text_width=None."
        )
      parts.append(self.text_proj(text_tokens.astype(jnp.float32)))
    elif text_tokens is not None:
      raise ValueError(
        f"text_tokens have shape {tuple(text_tokens.shape)}, but this decoder was built without "
        f"text; leave them out, or build it with text_width={text_tokens.shape[-1]}."
      )
    prefix = sum(part.shape[1] for part in parts)
    queries = self.queries[...]
    parts.append(jnp.broadcast_to(queries, (image_tokens.shape[0], *queries.shape)))
    x = constrain(jnp.concatenate([part.astype(dtype) for part in parts], axis=1))
    x = run_blocks(self.blocks, x, Mask("prefix", prefix), self.config)
    return self.norm(x[:, prefix:])
