"""The caption decoder of OpenVision 2: next-token prediction over [image tokens | text].

OpenVision 2: https://arxiv.org/abs/2509.01644.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models.attention import Mask, attend, attend_xla, check_implementation
from ov_models.blocks import (
  Block,
  BlockStyle,
  axes,
  fold_blocks,
  layer_norm,
  linear,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.config import TransformerConfig, check_choice, check_flag, from_fields, variant_sizes
from ov_models.contexts import any_mesh
from ov_models.partition import constrain
from ov_models.positions import check_sincos_dim, sincos1d

# name: (width, depth, mlp_dim, num_heads)
DECODER_VARIANTS = {
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (512, 12, 2048, 8),
  "L": (768, 12, 3072, 12),
  "So400m": (1152, 27, 4304, 16),
  "H": (1024, 24, 4096, 16),
  "g": (1024, 24, 4096, 16),
  "G": (1664, 48, 8192, 16),
  "e": (1792, 56, 15360, 16),
}

# The published models scale the residual projections by (2 * 12)^-0.5 at every depth: the depth
# never reached their initialiser. Kept, so that a run started here starts where theirs did.
_INIT_DEPTH = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
  """A caption decoder.

  Attributes:
    vocab_size: V, of the embedding and of the (untied) head.
    max_len: longest text T; learned positions have as many rows.
    mask: "prefix" the image tokens see each other and all text sees them; "causal" one triangle
      over image and text, as published.
    position: of text tokens: "learned", "sincos" (computed, any length) or "none". Image tokens
      get none here: they carry the encoder's. The default is "learned": under a prefix mask
      the order of the text is otherwise visible only through how many tokens each one sees, which
      a shallow decoder can hardly use, and T * D parameters are few.
    parallel: the decoder can also predict a whole caption at once (CapPa,
      https://arxiv.org/abs/2306.07915); adds one parameter, mask_embedding [D].
  """

  vocab_size: int
  max_len: int
  mask: Literal["prefix", "causal"] = "prefix"
  position: Literal["none", "learned", "sincos"] = "learned"
  parallel: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_positive("vocab_size")
    self._check_positive("max_len")
    check_choice("mask", self.mask, ("prefix", "causal"))
    check_choice("position", self.position, ("none", "learned", "sincos"))
    check_flag("parallel", self.parallel)
    if self.position == "sincos":
      check_sincos_dim(self.width, 2)
    if self.parallel:
      check_implementation(self.attention, "parallel prediction (parallel=True)")
      if self.position == "none":
        raise ValueError(
          "position='none' with parallel=True: all tokens are hidden, and without positions all "
          "predictions would be the same; set position='learned' or 'sincos'."
        )

  @classmethod
  def from_name(
    cls, name: str, vocab_size: int = 32000, max_len: int = 127, **overrides: Any
  ) -> "DecoderConfig":
    """A published size, e.g. "L"; `overrides` set any field."""
    sizes: dict[str, Any] = variant_sizes("decoder", name, DECODER_VARIANTS)
    sizes |= {"vocab_size": vocab_size, "max_len": max_len}
    return from_fields(cls, sizes | overrides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all tokens so far, [L, B, K + T, N, H] each; the first K are the image."""

  keys: jax.Array
  values: jax.Array
  num_image: int = dataclasses.field(metadata={"static": True})


def text_style(width: int) -> BlockStyle:
  """Blocks of all published text models: the decoders and the text tower."""
  residual = width**-0.5 * (2 * _INIT_DEPTH) ** -0.5
  return BlockStyle(
    gelu_tanh=True,
    qkv=normal(width**-0.5),
    out=normal(residual),
    up=normal((2 * width) ** -0.5),
    down=normal(residual),
  )


class Decoder(nnx.Module):
  """Caption decoder over image tokens of width `image_width`."""

  def __init__(self, config: DecoderConfig, image_width: int, *, rngs: nnx.Rngs) -> None:
    self.config = config
    d, v, f32 = config.width, config.vocab_size, jnp.dtype("float32")
    self.embed = nnx.Embed(
      v, d, embedding_init=normal(0.02), embedding_metadata=axes("vocab", "embed"), rngs=rngs
    )
    if config.position == "learned":
      table = normal(0.01)(rngs.params(), (config.max_len, d))
      self.position_embedding = nnx.Param(table, **axes(None, "embed"))
    if config.parallel:
      self.mask_embedding = nnx.Param(normal(0.02)(rngs.params(), (d,)), **axes("embed"))
    self.image_proj = linear(
      image_width, d, normal(image_width**-0.5), ("embed", None), f32, rngs, bias=False
    )
    self.blocks = stack_blocks(config, text_style(d), rngs=rngs)
    self.norm = layer_norm(d, f32, rngs)
    self.head = linear(d, v, normal(d**-0.5), ("embed", "vocab"), f32, rngs, bias=False)

  @any_mesh()
  def __call__(
    self, image_tokens: jax.Array, ids: jax.Array, parallel: jax.Array | None = None
  ) -> jax.Array:
    """Hidden states that predict the next token.

    In rows with `parallel` every token is replaced by one learned embedding and sees all
    positions: the whole caption is predicted at once, from the image alone.

    Args:
      image_tokens: [B, K, E] of the vision tower.
      ids: int32 [B, T], T <= max_len; ids[:, 0] is usually the begin token.
      parallel: bool [B], or None for no row; needs `config.parallel`.

    Returns:
      float32 [B, T, D]; position i has seen the image and ids[:, :i + 1], or only the image.

    Raises:
      ValueError: T > max_len with learned positions, shapes that do not fit, or `parallel` for a
        decoder built without it.
    """
    num_image = image_tokens.shape[1]
    text = self.embed_text(ids, parallel)
    x = jnp.concatenate([self.embed_image(image_tokens), text], axis=1)
    mask: Mask | jax.Array = self.mask(num_image)
    if parallel is not None:
      allowed = jnp.asarray(self.mask(num_image).array(x.shape[1]))
      mask = constrain(allowed | parallel[:, None, None, None])
    x = run_blocks(self.blocks, x, mask, self.config)
    return self.norm(x[:, num_image:])

  def prefill(self, image_tokens: jax.Array, max_len: int) -> Cache:
    """Runs the image tokens [B, K, E] and makes room for a text of `max_len` tokens."""
    num_image = image_tokens.shape[1]
    mask = self.mask(num_image)

    def step(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
      q, k, v = block.project(x)
      return block.finish(x, attend(q, k, v, mask, block.implementation)), (k, v)

    x = self.embed_image(image_tokens)
    _, (keys, values) = fold_blocks(step, self.blocks, x, None, self.config)
    room = ((0, 0), (0, 0), (0, max_len), (0, 0), (0, 0))
    return Cache(jnp.pad(keys, room), jnp.pad(values, room), num_image)

  def step(self, ids: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """One text token: equal to column `position` of `__call__` on the text so far.

    Args:
      ids: int32 [B], the token at `position`.
      position: int32 scalar, from 0.
      cache: has seen the image and every earlier position.

    Returns:
      hidden float32 [B, D] and the cache with this token.
    """
    at = cache.num_image + position
    allowed = jnp.arange(cache.keys.shape[2]) <= at

    def step(block: Block, x: jax.Array, past: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
      q, k, v = block.project(x)
      keys = jax.lax.dynamic_update_slice_in_dim(past[0], k, at, axis=1)
      values = jax.lax.dynamic_update_slice_in_dim(past[1], v, at, axis=1)
      return block.finish(x, attend_xla(q, keys, values, allowed)), (keys, values)

    x = self.embed(ids[:, None])
    if (table := self.positions(cache.keys.shape[2] - cache.num_image)) is not None:
      x = x + table[position]
    x = x.astype(self.config.compute_dtype)
    past = (cache.keys, cache.values)
    x, (keys, values) = fold_blocks(step, self.blocks, x, past, self.config)
    return self.norm(x[:, 0]), dataclasses.replace(cache, keys=keys, values=values)

  @property
  def head_kernel(self) -> jax.Array:
    """float32 [D, V]."""
    return self.head.kernel[...]

  @any_mesh()
  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., V]. Large: a loss should take hidden and head_kernel."""
    return jnp.einsum("...d,dv->...v", hidden, self.head_kernel, preferred_element_type=jnp.float32)

  def mask(self, num_image: int) -> Mask:
    """Who sees whom in a sequence of `num_image` image tokens [B, K, E] and any text after them."""
    return Mask(self.config.mask, num_image if self.config.mask == "prefix" else 0)

  def embed_image(self, image_tokens: jax.Array) -> jax.Array:
    """[B, K, E] -> [B, K, D] in compute dtype."""
    x = constrain(self.image_proj(image_tokens.astype(jnp.float32)))
    return x.astype(self.config.compute_dtype)

  def embed_text(self, ids: jax.Array, parallel: jax.Array | None = None) -> jax.Array:
    """int [B, T] -> [B, T, D] in compute dtype, positions from 0; rows of `parallel` masked."""
    if ids.ndim != 2:
      raise ValueError(f"ids have shape {tuple(ids.shape)}; expected [B, T].")
    x = self.embed(ids)
    if parallel is not None:
      if not self.config.parallel:
        raise ValueError("this decoder has no mask embedding; build it with parallel=True.")
      if parallel.shape != ids.shape[:1]:
        raise ValueError(
          f"parallel has shape {tuple(parallel.shape)}; expected {tuple(ids.shape[:1])}, one bool "
          "per row of ids."
        )
      x = jnp.where(parallel[:, None, None], self.mask_embedding[...], x)
    if (table := self.positions(ids.shape[1])) is not None:
      x = x + table
    return x.astype(self.config.compute_dtype)

  def positions(self, length: int) -> jax.Array | None:
    """What is added to the text embeddings: float32 [length, D] or None."""
    config = self.config
    if config.position == "none":
      return None
    if config.position == "sincos":
      # At the scale of a fresh embedding (rms 0.02), else the first norm drowns the words.
      return 0.02 * 2**0.5 * jnp.asarray(sincos1d(length, config.width))
    if length > config.max_len:
      raise ValueError(
        f"text of {length} tokens exceeds max_len={config.max_len} of the learned positions; "
        "shorten the text, or build the decoder with a larger max_len or position='sincos'."
      )
    return self.position_embedding[:length]
