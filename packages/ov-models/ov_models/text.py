"""Text encoder of OpenVision.

OpenVision: https://arxiv.org/abs/2505.04601. CLIP: https://arxiv.org/abs/2103.00020.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ov_models.attention import Mask
from ov_models.blocks import (
  axes,
  norm_of,
  normal,
  run_blocks,
  stack_blocks,
)
from ov_models.config import TransformerConfig, check_choice, from_fields, shown, variant_sizes
from ov_models.contexts import any_mesh
from ov_models.decoder import text_style
from ov_models.partition import HIDDEN, constrain
from ov_models.pooling import MapPool, pool_config
from ov_models.presets import PRESETS
from ov_models.shapes import AnyArray
from ov_models.tokens import mean_of

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
  """Config of a text tower.

  Attributes:
    vocab_size: vocabulary size V.
    max_len: maximum text length T and number of learned positions. With pool "last", all texts must
      have this length, because the pooled token is in the last column.
    pool: pooling of the normalised tokens: "last" (a [CLS] token that the tokenizer puts in the
      last column, after the padding), "first", "argmax" (the token with the largest id, the end
      token of CLIP), "mean", or "map" (attention pooling).
    mask: "full", or "causal": each token attends to itself and earlier tokens.
    padding: "mask": no token attends to padding, and "mean" and "map" ignore it; "attend": padding
      is treated like any other token, so the embedding depends on it.
    pad_id: id of the padding token.
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
    is_integer = isinstance(self.pad_id, int) and not isinstance(self.pad_id, bool)
    if not is_integer or not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f"pad_id={shown(self.pad_id)} is not in the vocabulary of {self.vocab_size} tokens; pass "
        "the pad_id of the tokenizer."
      )
    if self.pool == "first" and self.mask == "causal":
      raise ValueError(
        "pool='first' with mask='causal': the first token attends to itself only; set pool='last' "
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
    """Return the config of a published size, e.g. "L".

    Args:
      name: key of TEXT_VARIANTS.
      vocab_size: vocabulary size V.
      max_len: number of tokens per text.
      preset: key of PRESETS.
      **overrides: fields to set over those of the preset.
    """
    check_choice("preset", preset, PRESETS)
    sizes: dict[str, Any] = variant_sizes("text", name, TEXT_VARIANTS)
    sizes |= {"vocab_size": vocab_size, "max_len": max_len}
    return from_fields(cls, sizes | PRESETS[preset].text | overrides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextOutput:
  """Output of a text tower.

  Attributes:
    pooled: float32 pooled vector after the norm.
    tokens: token features before the norm, in compute dtype.
  """

  pooled: Float[Array, "B D"]
  tokens: Float[Array, "B T D"]


class TextEncoder(nnx.Module):
  """Text tower. Create it with `init` and `bind`."""

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
    self.norm = norm_of(config, rngs, dtype=jnp.dtype("float32"))
    if config.pool == "map":
      float32 = dataclasses.replace(pool_config(config), dtype="float32", attention="xla")
      self.pool = MapPool(float32, style, rngs=rngs)

  @any_mesh()
  def __call__(self, ids: Int[AnyArray, "B T"]) -> TextOutput:
    """Encode texts.

    Args:
      ids: token ids; T is max_len with pool "last", otherwise at most max_len.

    Raises:
      ValueError: if the rank or length of the ids is invalid.
    """
    x, valid = self._embed(ids)
    x = run_blocks(self.blocks, x, Mask(self.config.mask), self.config, valid)
    return TextOutput(pooled=self._pool(x, ids, valid), tokens=x)

  @any_mesh(axis=1)
  def hidden_states(self, ids: Int[AnyArray, "B T"]) -> Float[Array, "L B T D"]:
    """Return the input of the first block and the outputs of all blocks, in compute dtype."""
    x, valid = self._embed(ids)
    return run_blocks(self.blocks, x, Mask(self.config.mask), self.config, valid, all_layers=True)

  def _embed(
    self, ids: Int[AnyArray, "B T"]
  ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"] | None]:
    """Return embedded tokens in compute dtype, and the padding mask if padding is masked."""
    config, ids = self.config, jnp.asarray(ids)
    self._check(ids)
    x = self.embed(ids) + self.position_embedding[: ids.shape[1]]
    valid = constrain(ids != config.pad_id, "batch", "length") if config.padding == "mask" else None
    return constrain(x.astype(config.compute_dtype), *HIDDEN), valid

  def _pool(
    self, x: Float[Array, "B T D"], ids: Int[AnyArray, "B T"], valid: Bool[Array, "B T"] | None
  ) -> Float[Array, "B D"]:
    pool = self.config.pool
    if pool == "last":
      return self.norm(x[:, -1])
    if pool == "first":
      return self.norm(x[:, 0])
    if pool == "argmax":
      return self.norm(jnp.take_along_axis(x, ids.argmax(axis=1)[:, None, None], axis=1)[:, 0])
    normed = self.norm(x)
    if pool == "map":
      return self.pool(normed, valid)
    return mean_of(normed, valid)

  def _check(self, ids: jax.Array) -> None:
    config = self.config
    if ids.ndim != 2:
      raise ValueError(f"ids have shape {tuple(ids.shape)}; expected [B, T].")
    length = ids.shape[1]
    if config.pool == "last" and length != config.max_len:
      raise ValueError(
        f"texts of {length} tokens, but pool='last' reads the token in column {config.max_len - 1}"
        f"; pad or truncate texts to max_len={config.max_len}, with [CLS] at the end."
      )
    if length > config.max_len:
      raise ValueError(
        f"text of {length} tokens exceeds max_len={config.max_len} of the learned positions; "
        "shorten the text, or build the tower with a larger max_len."
      )
