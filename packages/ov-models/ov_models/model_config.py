"""Config of a vision-language model: its towers, decoder, embedding space and token masking."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Literal

from ov_models import masking
from ov_models.config import (
  check_choice,
  check_finite,
  check_flag,
  check_part,
  check_ratio,
  check_size,
)
from ov_models.decoder import DecoderConfig
from ov_models.presets import EMBED_DIMS, PRESETS
from ov_models.query_decoder import QueryDecoderConfig
from ov_models.text import TextConfig
from ov_models.vit_config import ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
  """Config of an image encoder with an optional text tower and an optional caption decoder.

  Attributes:
    encoder: config of the image tower.
    text: config of the text tower. Without it, the model has no projection heads and no
      temperature, and the embedding of an image is its pooled vector.
    decoder: config of the caption decoder, with learned queries or teacher-forced.
    embed_dim: size E of the embedding space shared by images and texts. Default, and required
      without a text tower: the width of the encoder.
    log_scale_init: initial log-temperature; similarities are multiplied by its exponential.
    image_head: whether image features are projected to the embedding space, without bias. Without
      a head, the embedding of an image is its pooled vector, as in SigLIP.
    text_head_bias: whether the projection of text features has a bias, as in SigLIP.
    bias_init: initial bias of the similarities (SigLIP, https://arxiv.org/abs/2303.15343), or None
      for no bias.
    parallel_ratio: fraction in [0, 1) of the training captions that a decoder with `parallel=True`
      predicts in parallel from the image alone (CapPa).
    keep_ratio: fraction in (0, 1] of the encoder tokens that the decoder gets in training.
    keep_order: order of the kept tokens: "sorted" (image order) or "random".
    eval_keep: tokens for the decoder without a key: "all", or a "fixed", evenly spread fraction
      keep_ratio.
  """

  encoder: ViTConfig
  text: TextConfig | None = None
  decoder: QueryDecoderConfig | DecoderConfig | None = None
  embed_dim: int = None  # type: ignore[assignment]  # __post_init__ sets it
  log_scale_init: float = math.log(1 / 0.07)
  bias_init: float | None = None
  image_head: bool = True
  text_head_bias: bool = False
  parallel_ratio: float = 0.0
  keep_ratio: float = 1.0
  keep_order: Literal["sorted", "random"] = "sorted"
  eval_keep: Literal["all", "fixed"] = "all"

  def __post_init__(self) -> None:
    check_part("encoder", self.encoder, ViTConfig)
    if self.text is not None:
      check_part("text", self.text, TextConfig)
    if self.decoder is not None:
      check_part("decoder", self.decoder, QueryDecoderConfig, DecoderConfig)
    if self.embed_dim is None:
      object.__setattr__(self, "embed_dim", self.encoder.width)
    check_size("embed_dim", self.embed_dim)
    check_finite("log_scale_init", self.log_scale_init)
    if self.bias_init is not None:
      check_finite("bias_init", self.bias_init)
    check_flag("image_head", self.image_head)
    check_flag("text_head_bias", self.text_head_bias)
    if self.text is None:
      self._check_without_text()
    elif not self.image_head and self.embed_dim != self.encoder.width:
      raise ValueError(
        f"embed_dim={self.embed_dim} with image_head=False: an image is embedded as its pooled "
        f"vector; set embed_dim={self.encoder.width}."
      )
    check_ratio("parallel_ratio", self.parallel_ratio, zero=True, one=False)
    parallel = isinstance(self.decoder, DecoderConfig) and self.decoder.parallel
    if self.parallel_ratio > 0 and not parallel:
      raise ValueError(
        f"parallel_ratio={self.parallel_ratio} needs a teacher-forced decoder with parallel=True; "
        f"decoder is {self.decoder!r}."
      )
    check_ratio("keep_ratio", self.keep_ratio, zero=False, one=True)
    check_choice("keep_order", self.keep_order, ("sorted", "random"))
    check_choice("eval_keep", self.eval_keep, ("all", "fixed"))
    if self.decoder is None and self.keep_ratio < 1:
      raise ValueError(
        f"keep_ratio={self.keep_ratio} without a decoder: no part reads the kept tokens; set "
        "keep_ratio=1, or mask_ratio of the encoder to drop patches."
      )

  def _check_without_text(self) -> None:
    if self.decoder is None:
      raise ValueError("text=None and decoder=None leave only an image tower; use a ViTConfig.")
    if self.embed_dim != self.encoder.width:
      raise ValueError(
        f"embed_dim={self.embed_dim} without a text tower: an image is embedded as its pooled "
        f"vector; set embed_dim={self.encoder.width}."
      )
    if self.bias_init is not None:
      raise ValueError(
        f"bias_init={self.bias_init} without a text tower: there are no similarities to add it "
        "to; set bias_init=None."
      )

  @classmethod
  def from_names(
    cls,
    encoder: str,
    text: str | None = None,
    decoder: str | None = None,
    *,
    preset: str = "default",
    image_size: int = 224,
    vocab_size: int = 32000,
    text_len: int = 80,
    caption_len: int = 128,
    decoder_kind: Literal["queries", "teacher_forced"] = "queries",
    embed_dim: int | None = None,
    encoder_options: Mapping[str, Any] | None = None,
    text_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
    **options: Any,
  ) -> "VisionLanguageConfig":
    """Return a model of published sizes, e.g. ("L/14", "L", "L").

    Args:
      encoder: variant of the image tower, see ViTConfig.from_name.
      text: variant of the text tower, see TextConfig.from_name; None for no text tower.
      decoder: key of DECODER_VARIANTS; None for no decoder.
      preset: key of PRESETS.
      image_size: height and width of images in pixels.
      vocab_size: vocabulary size V of the text tower and the decoder.
      text_len: number of tokens per text of the text tower.
      caption_len: number of queries, or maximum caption length of a teacher-forced decoder.
      decoder_kind: "queries" as in OpenVision, "teacher_forced" as in OpenVision 2.
      embed_dim: size E of the embedding space; None for the published one. Ignored without a text
        tower.
      encoder_options: fields of ViTConfig to set.
      text_options: fields of TextConfig to set, over those of the preset.
      decoder_options: fields of the decoder's config to set, over those of the preset.
      **options: other fields of VisionLanguageConfig to set, over those of the preset
        (parallel_ratio > 0 gives the decoder parallel=True), and fields to set in every part, e.g.
        dtype, remat, attention, scan.

    Raises:
      ValueError: if a name is unknown or fields are inconsistent.
    """
    check_choice("preset", preset, PRESETS)
    check_choice("decoder_kind", decoder_kind, ("queries", "teacher_forced"))
    preset_fields = PRESETS[preset]
    model_fields = preset_fields.model | {
      name: options[name] for name in _OPTIONS if name in options
    }
    shared_fields = {k: value for k, value in options.items() if k not in _OPTIONS}
    encoder_config = ViTConfig.from_name(
      encoder, image_size, **(shared_fields | dict(encoder_options or {}))
    )
    text_config = None
    if text is not None:
      fields = shared_fields | dict(text_options or {})
      text_config = TextConfig.from_name(text, vocab_size, text_len, preset, **fields)
    decoder_config: QueryDecoderConfig | DecoderConfig | None = None
    if decoder is not None and decoder_kind == "queries":
      fields = shared_fields | dict(decoder_options or {})
      decoder_config = QueryDecoderConfig.from_name(decoder, vocab_size, caption_len, **fields)
    elif decoder is not None:
      fields = (
        shared_fields
        | preset_fields.decoder
        | {"parallel": model_fields.get("parallel_ratio", 0) > 0}
      )
      fields |= dict(decoder_options or {})
      decoder_config = DecoderConfig.from_name(decoder, vocab_size, caption_len, **fields)
    if embed_dim is None:
      embed_dim = EMBED_DIMS.get(encoder.partition("/")[0], encoder_config.width)
    model_fields["embed_dim"] = encoder_config.width if text is None else embed_dim
    return cls(encoder=encoder_config, text=text_config, decoder=decoder_config, **model_fields)

  @classmethod
  def openvision2(
    cls, image: str, decoder: str, *, max_len: int = 127, keep_ratio: float = 0.35, **options: Any
  ) -> "VisionLanguageConfig":
    """Return the config of a published OpenVision 2 model, e.g. ("L/14", "L").

    Args:
      image: variant of the image tower, see ViTConfig.from_name.
      decoder: variant of the decoder, see DecoderConfig.from_name.
      max_len: maximum caption length.
      keep_ratio: fraction of the image tokens kept in training.
      **options: see `from_names`.
    """
    options |= {"decoder_kind": "teacher_forced", "keep_ratio": keep_ratio}
    return cls.from_names(image, None, decoder, caption_len=max_len, **options)

  @property
  def num_kept(self) -> int:
    """Return the number K of image tokens that the decoder gets in training."""
    return masking.num_kept(self.encoder.num_unmasked, self.keep_ratio)

  @property
  def caption_len(self) -> int:
    """Return the maximum caption length in tokens; 0 without a decoder."""
    if isinstance(self.decoder, DecoderConfig):
      return self.decoder.max_len
    return 0 if self.decoder is None else self.decoder.num_queries

  @property
  def can_embed_text(self) -> bool:
    """Return whether the model embeds texts."""
    return self.text is not None

  @property
  def can_generate(self) -> bool:
    """Return whether the decoder is autoregressive, as `generate` requires."""
    return isinstance(self.decoder, DecoderConfig)


# Fields of VisionLanguageConfig that `from_names` accepts as options.
_OPTIONS = frozenset(
  field.name
  for field in dataclasses.fields(VisionLanguageConfig)
  if field.name not in ("encoder", "text", "decoder", "embed_dim")
)
