"""Caption decoder of OpenVision: learned queries over [image | text | queries].

OpenVision: https://arxiv.org/abs/2505.04601.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ov_models.attention import Mask
from ov_models.blocks import axes, linear, norm_of, normal, run_blocks, stack_blocks
from ov_models.config import TransformerConfig, from_fields, variant_sizes
from ov_models.contexts import any_mesh
from ov_models.decoder import DECODER_VARIANTS, text_style
from ov_models.partition import HIDDEN, constrain
from ov_models.shapes import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryDecoderConfig(TransformerConfig):
  """Config of a caption decoder with learned queries, which does not read the caption.

  Attributes:
    vocab_size: vocabulary size V of the head.
    num_queries: number Q of queries, one per predicted caption token.
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
    """Return the config of a published size, e.g. "L"; `overrides` set any field."""
    sizes: dict[str, Any] = variant_sizes("decoder", name, DECODER_VARIANTS)
    sizes |= {"vocab_size": vocab_size, "num_queries": num_queries}
    return from_fields(cls, sizes | overrides)


class QueryDecoder(nnx.Module):
  """Caption decoder that predicts each caption token from one learned query.

  The sequence is [image | text | queries]. Image and text tokens attend to each other; query i
  attends to both and to queries 0..i. No positions are added: queries are learned, and image and
  text tokens have the positions of their towers. The decoder does not read caption tokens, so it is
  less accurate than `Decoder` and cannot generate token by token.

  Args:
    config: configuration of the decoder.
    image_width: width E of the image tokens.
    text_width: width W of the text tokens; None for a decoder without text.
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
    self.norm = norm_of(config, rngs, dtype=f32)
    self.head = linear(d, v, normal(d**-0.5), ("embed", "vocab"), f32, rngs, bias=False)

  @any_mesh()
  def __call__(
    self,
    image_tokens: Float[AnyArray, "B K E"],
    text_tokens: Float[AnyArray, "B T W"] | None = None,
  ) -> Float[Array, "B Q D"]:
    """Return the hidden states that predict the caption.

    Args:
      image_tokens: tokens of the vision tower.
      text_tokens: tokens of the text tower; None if the decoder has no text_width.

    Returns:
      float32 hidden states; row i predicts caption token i.

    Raises:
      ValueError: if text tokens are missing, or the decoder was built without text.
    """
    dtype = self.config.compute_dtype
    parts = [self.image_proj(image_tokens.astype(jnp.float32))]
    if self.text_proj is not None:
      if text_tokens is None:
        raise ValueError(
          "text_tokens=None, but this decoder reads a text and the image; pass text_tokens "
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
    x = jnp.concatenate([part.astype(dtype) for part in parts], axis=1)
    x = constrain(x, *HIDDEN)
    x = run_blocks(self.blocks, x, Mask("prefix", prefix), self.config)
    return self.norm(x[:, prefix:])
