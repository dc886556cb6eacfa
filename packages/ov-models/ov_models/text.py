"""The text encoder of OpenVision: token ids to one pooled vector and to token features.

OpenVision: https://arxiv.org/abs/2505.04601. CLIP's: https://arxiv.org/abs/2103.00020.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models.attention import Mask
from ov_models.blocks import (
  axes,
  block_outputs,
  layer_norm,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.config import TransformerConfig, check_choice, from_fields, shown, variant_sizes
from ov_models.contexts import any_mesh
from ov_models.decoder import text_style
from ov_models.partition import constrain
from ov_models.presets import PRESETS
from ov_models.vit import MapPool

# name: (width, depth, mlp_dim, num_heads)
TEXT_VARIANTS = {
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (512, 12, 2048, 8),
  "L": (768, 12, 3072, 12),
  "So400m": (1152, 27, 4304, 16),
  "H": (1024, 24, 4096, 16),
  "g": (1280, 32, 5120, 16),
  "G": (1664, 48, 8192, 16),
  "e": (1792, 56, 15360, 16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
  """A text tower.

  Attributes:
    vocab_size: V.
    max_len: longest text T, rows of the learned positions. With pool "last" every text has exactly
      this length, for the pooled token stands at its end and its position is learned there.
    pool: which normed token stands for the text: "last" (a [CLS] that the tokenizer puts into the
      last column, after the padding), "first", "argmax" (where the id is largest: the end token of
      CLIP's vocabulary), "mean" of all tokens, or "map" attention pooling over them.
    mask: "full" each token sees all, "causal" each sees itself and earlier ones.
    padding: "mask" no token sees padding, and "mean" and "map" leave it out; "attend" padding is a
      token like any other, so that a text padded further is another text.
    pad_id: the id of padding.
  """

  vocab_size: int
  max_len: int
  pool: Literal["last", "first", "argmax", "mean", "map"] = "last"
  mask: Literal["full", "causal"] = "full"
  padding: Literal["attend", "mask"] = "mask"
  pad_id: int = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    self._check_positive("vocab_size")
    self._check_positive("max_len")
    check_choice("pool", self.pool, ("last", "first", "argmax", "mean", "map"))
    check_choice("mask", self.mask, ("full", "causal"))
    check_choice("padding", self.padding, ("attend", "mask"))
    whole = isinstance(self.pad_id, int) and not isinstance(self.pad_id, bool)
    if not whole or not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f"pad_id={shown(self.pad_id)} is no id of a vocabulary of {self.vocab_size}; give the "
        "tokenizer's."
      )
    if self.pool == "first" and self.mask == "causal":
      raise ValueError(
        "pool='first' with mask='causal': the first token sees nothing but itself; set pool='last' "
        "or mask='full'."
      )

  @classmethod
  def from_name(
    cls,
    name: str,
    vocab_size: int = 32000,
    max_len: int = 80,
    preset: str = "default",
    **overrides: Any,
  ) -> "TextConfig":
    """A published size, e.g. "L"; `overrides` set any field, over those of the preset.

    Args:
      name: of TEXT_VARIANTS.
      vocab_size: V.
      max_len: tokens per text.
      preset: of PRESETS.
      **overrides: any field.
    """
    check_choice("preset", preset, PRESETS)
    sizes: dict[str, Any] = variant_sizes("text", name, TEXT_VARIANTS)
    sizes |= {"vocab_size": vocab_size, "max_len": max_len}
    return from_fields(cls, sizes | PRESETS[preset].text | overrides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOutput:
  """pooled float32 [B, D] after the norm; tokens [B, T, D] before it, in compute dtype."""

  pooled: jax.Array
  tokens: jax.Array


class TextEncoder(nnx.Module):
  """Text tower. Build it by `init` and `bind`, not by hand."""

  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    d, style = config.width, text_style(config.width)
    self.embed = nnx.Embed(
      config.vocab_size, d, embedding_init=normal(0.02),
      embedding_metadata=axes("vocab", "embed"), rngs=rngs,
    )  # fmt: skip
    table = normal(0.01)(rngs.params(), (config.max_len, d))
    self.position_embedding = nnx.Param(table, **axes(None, "embed"))
    self.blocks = stack_blocks(config, style, rngs=rngs)
    self.norm = layer_norm(d, jnp.dtype("float32"), rngs)
    if config.pool == "map":
      float32 = dataclasses.replace(config, dtype="float32", attention="xla")
      self.pool = MapPool(float32, style, rngs=rngs)

  @any_mesh()
  def __call__(self, ids: jax.Array) -> TextOutput:
    """Encodes texts.

    Args:
      ids: int32 [B, T]; T = max_len with pool "last", else at most that.

    Returns:
      TextOutput.

    Raises:
      ValueError: ids of another rank or of a length that does not fit.
    """
    x, mask = self._embed(ids)
    x = run_blocks(self.blocks, x, mask, self.config)
    return TextOutput(pooled=self._pool(x, ids, mask.keys), tokens=x)

  @any_mesh(axis=1)
  def hidden_states(self, ids: jax.Array) -> jax.Array:
    """[L + 1, B, T, D] in compute dtype: what enters the blocks, and what leaves each of them."""
    x, mask = self._embed(ids)
    return block_outputs(self.blocks, x, mask, self.config)

  def _embed(self, ids: jax.Array) -> tuple[jax.Array, Mask]:
    """Tokens with positions [B, T, D] in compute dtype, and who sees whom."""
    config = self.config
    self._check(ids)
    x = self.embed(ids) + self.position_embedding[: ids.shape[1]]
    real = constrain(ids != config.pad_id) if config.padding == "mask" else None
    return constrain(x.astype(config.compute_dtype)), Mask(config.mask, keys=real)

  def _pool(self, x: jax.Array, ids: jax.Array, real: jax.Array | None) -> jax.Array:
    pool = self.config.pool
    if pool == "last":
      return self.norm(x[:, -1])
    if pool == "first":
      return self.norm(x[:, 0])
    if pool == "argmax":
      return self.norm(jnp.take_along_axis(x, ids.argmax(axis=1)[:, None, None], axis=1)[:, 0])
    normed = self.norm(x)
    if pool == "map":
      return self.pool(normed, real)
    if real is None:
      return normed.mean(axis=1)
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    return (normed * real[:, :, None]).sum(axis=1) / count

  def _check(self, ids: jax.Array) -> None:
    config = self.config
    if ids.ndim != 2:
      raise ValueError(f"ids have shape {tuple(ids.shape)}; expected [B, T].")
    length = ids.shape[1]
    if config.pool == "last" and length != config.max_len:
      raise ValueError(
        f"texts of {length} tokens, but pool='last' reads the token in column {config.max_len - 1}"
        f"; pad or cut texts to max_len={config.max_len}, with [CLS] at the end."
      )
    if length > config.max_len:
      raise ValueError(
        f"text of {length} tokens exceeds max_len={config.max_len} of the learned positions; "
        "shorten the text, or build the tower with a larger max_len."
      )
