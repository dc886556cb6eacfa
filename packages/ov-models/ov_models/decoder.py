"""Caption decoder of OpenVision 2: next-token prediction over [image tokens | text].

OpenVision 2: https://arxiv.org/abs/2509.01644.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ov_models.attention import Mask, attend, attend_xla, check_implementation
from ov_models.blocks import (
  Block,
  BlockStyle,
  axes,
  fold_blocks,
  linear,
  norm_of,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.config import TransformerConfig, check_choice, check_flag, from_fields, variant_sizes
from ov_models.contexts import any_mesh
from ov_models.partition import HIDDEN, constrain
from ov_models.positions import check_sincos_dim, sincos1d
from ov_models.shapes import AnyArray

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

# The released code scales residual projections by (2 * 12)^-0.5 at every depth, because its
# initialiser ignores the depth. Kept to match its initialisation.
_INIT_DEPTH = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
  """Config of a teacher-forced caption decoder.

  Attributes:
    vocab_size: vocabulary size V of the embedding and the (untied) head.
    max_len: maximum text length T and number of learned positions.
    mask: "prefix": image tokens attend to each other, and text attends to all of them; "causal":
      causal over image and text, as published.
    position: positions of the text tokens: "learned", "sincos" (any length) or "none". Image tokens
      have the positions of the encoder. The default is "learned", because with a prefix mask a
      shallow decoder can hardly infer the text order without positions.
    parallel: whether the decoder can also predict all tokens in parallel (CapPa,
      https://arxiv.org/abs/2306.07915); adds a parameter mask_embedding [D].
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
          "position='none' with parallel=True: tokens are masked, so without positions all "
          "predictions would be equal; set position='learned' or 'sincos'."
        )

  @classmethod
  def from_name(
    cls, name: str, vocab_size: int = 32000, max_len: int = 127, **overrides: Any
  ) -> "DecoderConfig":
    """Return the config of a published size, e.g. "L"; `overrides` set any field."""
    sizes: dict[str, Any] = variant_sizes("decoder", name, DECODER_VARIANTS)
    sizes |= {"vocab_size": vocab_size, "max_len": max_len}
    return from_fields(cls, sizes | overrides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Key-value cache; the first `num_image` tokens are image tokens."""

  keys: Float[Array, "L B T N H"]
  values: Float[Array, "L B T N H"]
  num_image: int = dataclasses.field(metadata={"static": True})


def text_style(width: int) -> BlockStyle:
  """Return the block style of the published decoders and text towers."""
  residual = width**-0.5 * (2 * _INIT_DEPTH) ** -0.5
  return BlockStyle(
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
    self.norm = norm_of(config, rngs, dtype=f32)
    self.head = linear(d, v, normal(d**-0.5), ("embed", "vocab"), f32, rngs, bias=False)

  @any_mesh()
  def __call__(
    self,
    image_tokens: Float[AnyArray, "B K E"],
    ids: Int[AnyArray, "B T"],
    parallel: Bool[AnyArray, " B"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Return the hidden states that predict the next token.

    In rows with `parallel`, all tokens are replaced by one learned embedding and attend to all
    positions: the caption is predicted in parallel from the image alone.

    Args:
      image_tokens: tokens of the vision tower.
      ids: token ids, T <= max_len; ids[:, 0] is usually the begin token.
      parallel: rows to predict in parallel, or None; requires `config.parallel`.

    Returns:
      float32 hidden states; position i depends on the image and on ids[:, :i + 1], or on the image
      only in parallel rows.

    Raises:
      ValueError: if T > max_len with learned positions, a shape is invalid, or `parallel` is not
        supported by the config.
    """
    num_image = image_tokens.shape[1]
    text = self.embed_text(ids, parallel)
    x = jnp.concatenate([self.embed_image(image_tokens), text], axis=1)
    mask: Mask | jax.Array = self.mask(num_image)
    if parallel is not None:
      allowed = jnp.asarray(self.mask(num_image).array(x.shape[1]))
      mask = constrain(allowed | parallel[:, None, None, None], "batch", None, "length", "length")
    x = run_blocks(self.blocks, x, mask, self.config)
    return self.norm(x[:, num_image:])

  def prefill(self, image_tokens: Float[AnyArray, "B K E"], max_len: int) -> Cache:
    """Run the image tokens and allocate a cache for `max_len` text tokens."""
    num_image = image_tokens.shape[1]
    mask = self.mask(num_image)

    def step(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
      q, k, v = block.qkv(x)
      return block.residual(x, attend(q, k, v, mask, block.implementation)), (k, v)

    x = self.embed_image(image_tokens)
    _, (keys, values) = fold_blocks(step, self.blocks, x, None, self.config)
    padding = ((0, 0), (0, 0), (0, max_len), (0, 0), (0, 0))
    return Cache(jnp.pad(keys, padding), jnp.pad(values, padding), num_image)

  def step(
    self, ids: Int[Array, " B"], position: Int[Array, ""], cache: Cache
  ) -> tuple[Float[Array, "B D"], Cache]:
    """Run one text token; equals column `position` of `__call__` on the text so far.

    Args:
      ids: token ids at `position`.
      position: text position, from 0.
      cache: cache with the image and all earlier positions.

    Returns:
      The float32 hidden state, and the cache with this token.
    """
    at = cache.num_image + position
    allowed = jnp.arange(cache.keys.shape[2]) <= at

    def step(block: Block, x: jax.Array, past: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
      q, k, v = block.qkv(x)
      keys = jax.lax.dynamic_update_slice_in_dim(past[0], k, at, axis=1)
      values = jax.lax.dynamic_update_slice_in_dim(past[1], v, at, axis=1)
      return block.residual(x, attend_xla(q, keys, values, allowed)), (keys, values)

    x = self.embed(ids[:, None])
    if (table := self.positions(cache.keys.shape[2] - cache.num_image)) is not None:
      x = x + table[position]
    x = x.astype(self.config.compute_dtype)
    past = (cache.keys, cache.values)
    x, (keys, values) = fold_blocks(step, self.blocks, x, past, self.config)
    return self.norm(x[:, 0]), dataclasses.replace(cache, keys=keys, values=values)

  @property
  def head_kernel(self) -> Float[AnyArray, "D V"]:
    """Return the float32 head weights."""
    return self.head.kernel[...]

  @any_mesh()
  def logits(self, hidden: Float[AnyArray, "*B D"]) -> Float[Array, "*B V"]:
    """Return float32 logits. To save memory, pass hidden and head_kernel to the loss instead."""
    return jnp.einsum("...d,dv->...v", hidden, self.head_kernel, preferred_element_type=jnp.float32)

  def mask(self, num_image: int) -> Mask:
    """Return the attention mask of `num_image` image tokens followed by text."""
    return Mask(self.config.mask, num_image if self.config.mask == "prefix" else 0)

  def embed_image(self, image_tokens: Float[AnyArray, "B K E"]) -> Float[Array, "B K D"]:
    """Project image tokens to the width, in compute dtype."""
    x = self.image_proj(image_tokens.astype(jnp.float32))
    return constrain(x, *HIDDEN).astype(self.config.compute_dtype)

  def embed_text(
    self, ids: Int[AnyArray, "B T"], parallel: Bool[AnyArray, " B"] | None = None
  ) -> Float[Array, "B T D"]:
    """Embed ids with positions, in compute dtype; `parallel` rows get the mask embedding."""
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

  def positions(self, length: int) -> Float[AnyArray, "{length} D"] | None:
    """Return the float32 position embeddings of the text, or None."""
    config = self.config
    if config.position == "none":
      return None
    if config.position == "sincos":
      # Scaled to the rms of initial embeddings (0.02); otherwise positions dominate after the norm.
      return 0.02 * 2**0.5 * jnp.asarray(sincos1d(length, config.width))
    if length > config.max_len:
      raise ValueError(
        f"text of {length} tokens exceeds max_len={config.max_len} of the learned positions; "
        "shorten the text, or build the decoder with a larger max_len or position='sincos'."
      )
    return self.position_embedding[:length]
