"""OpenVision 2: a vision tower trained only by captioning, from a subset of its patch tokens.

Paper: https://arxiv.org/abs/2509.01644.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models import masking
from ov_models.config import check_choice, check_part, check_ratio
from ov_models.contexts import any_mesh
from ov_models.decoder import Decoder, DecoderConfig
from ov_models.vit import ViT, ViTConfig, ViTOutput

_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  # (fields of the captioner, fields of the decoder)
  "default": ({"keep_order": "sorted"}, {"mask": "prefix", "position": "learned"}),
  "openvision2_released": ({"keep_order": "random"}, {"mask": "causal", "position": "none"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
  """A vision tower, a decoder, and which image tokens the decoder gets.

  Attributes:
    encoder: the vision tower.
    decoder: the caption decoder.
    keep_ratio: share of the tower's tokens that the decoder gets in training, in (0, 1].
    keep_order: order of the kept tokens: "sorted" as in the image, "random" as published.
    eval_keep: without a key, "all" tokens, or a "fixed" evenly spread share keep_ratio of them.
  """

  encoder: ViTConfig
  decoder: DecoderConfig
  keep_ratio: float = 1.0
  keep_order: Literal["sorted", "random"] = "sorted"
  eval_keep: Literal["all", "fixed"] = "all"

  def __post_init__(self) -> None:
    check_part("encoder", self.encoder, ViTConfig)
    check_part("decoder", self.decoder, DecoderConfig)
    check_ratio("keep_ratio", self.keep_ratio, zero=False, one=True)
    check_choice("keep_order", self.keep_order, ("sorted", "random"))
    check_choice("eval_keep", self.eval_keep, ("all", "fixed"))

  @classmethod
  def openvision2(
    cls,
    image: str,
    decoder: str,
    *,
    image_size: int = 224,
    vocab_size: int = 32000,
    max_len: int = 127,
    keep_ratio: float = 0.35,
    preset: Literal["default", "openvision2_released"] = "default",
    eval_keep: Literal["all", "fixed"] = "all",
    encoder_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
    **both: Any,
  ) -> "CaptionerConfig":
    """A published pair of sizes, e.g. ("L/14", "L").

    Args:
      image: name of the tower, as for ViTConfig.from_name.
      decoder: name of the decoder, as for DecoderConfig.from_name.
      image_size: pixels.
      vocab_size: V.
      max_len: longest text.
      keep_ratio: share of image tokens kept in training.
      preset: "openvision2_released" is what the published code computes: causal over image and
        text, kept tokens in random order, no positions in the decoder. "default" is ours: prefix
        mask, image order, learned text positions.
      eval_keep: see CaptionerConfig.
      encoder_options: fields of ViTConfig to set.
      decoder_options: fields of DecoderConfig to set, over those of the preset.
      **both: fields to set in both, e.g. dtype, remat, attention, scan.
    """
    check_choice("preset", preset, _PRESETS)
    own, text = _PRESETS[preset]
    tower = ViTConfig.from_name(image, image_size, **(both | dict(encoder_options or {})))
    text = both | text | dict(decoder_options or {})
    return cls(
      encoder=tower,
      decoder=DecoderConfig.from_name(decoder, vocab_size, max_len, **text),
      keep_ratio=keep_ratio,
      eval_keep=eval_keep,
      **own,
    )

  @property
  def num_kept(self) -> int:
    """K: image tokens that the decoder gets in training."""
    return masking.num_kept(self.encoder.num_unmasked, self.keep_ratio)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CaptionerOutput:
  """hidden float32 [B, T, D], after the decoder's norm; tokens and pooled of the vision tower."""

  hidden: jax.Array
  image_tokens: jax.Array
  pooled: jax.Array


class Captioner(nnx.Module):
  """Images and the caption so far to hidden states of the next tokens."""

  def __init__(self, config: CaptionerConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    self.encoder = ViT(config.encoder, rngs=rngs)
    self.decoder = Decoder(config.decoder, config.encoder.width, rngs=rngs)

  @any_mesh()
  def __call__(
    self, images: jax.Array, ids: jax.Array, key: jax.Array | None = None
  ) -> CaptionerOutput:
    """Runs tower and decoder.

    Args:
      images: float32 [B, H, W, 3], normalised.
      ids: int32 [B, T].
      key: randomness of training: patches masked, tokens kept. Without it nothing is random.

    Returns:
      CaptionerOutput; image_tokens are all tokens of the tower, before the decoder's selection.
    """
    out, kept = self.encode(images, key)
    with jax.named_scope("decoder"):
      hidden = self.decoder(kept, ids)
    return CaptionerOutput(hidden=hidden, image_tokens=out.tokens, pooled=out.pooled)

  @any_mesh()
  def encode(self, images: jax.Array, key: jax.Array | None = None) -> tuple[ViTOutput, jax.Array]:
    """Output of the tower, and the tokens [B, K, E] that the decoder gets."""
    mask_key, keep_key = (None, None) if key is None else jax.random.split(key)
    with jax.named_scope("encoder"):
      out = self.encoder(images, mask_key)
    config, tokens = self.config, out.tokens
    batch, total = tokens.shape[:2]
    keep = masking.num_kept(total, config.keep_ratio)
    if keep_key is None:
      if config.eval_keep == "fixed":
        grid = config.encoder.grid_of(images.shape[1], images.shape[2])
        tokens = masking.take_tokens(tokens, jnp.asarray(masking.fixed_index(grid, keep)))
    elif config.keep_ratio < 1:
      ordered = config.keep_order == "sorted"
      index = masking.random_index(keep_key, batch, total, keep, ordered=ordered)
      tokens = masking.take_tokens(tokens, index)
    return out, tokens

  @property
  def head_kernel(self) -> jax.Array:
    """float32 [D, V]."""
    return self.decoder.head_kernel

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> float32 [B, T, V]. Large: a loss should take hidden and head_kernel."""
    return self.decoder.logits(hidden)
