"""The config of a vision-language model: which parts it has, and what joins them."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Literal

from ov_models import masking
from ov_models.config import check_choice, check_finite, check_part, check_ratio, check_size
from ov_models.decoder import DecoderConfig
from ov_models.presets import EMBED_DIMS, PRESETS
from ov_models.query_decoder import QueryDecoderConfig
from ov_models.text import TextConfig
from ov_models.vit import ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
  """An image encoder and the parts that read text or write it.

  Attributes:
    encoder: the image tower.
    text: the text tower. Without it there are no heads and no temperature, and the embedding of an
      image is its pooled vector.
    decoder: the caption decoder, with learned queries or teacher-forced.
    embed_dim: E, size of the space that images and texts share. Without a text tower it is the
      width of the encoder, which None stands for.
    log_scale_init: initial log-temperature; similarities are multiplied by its exp.
    bias_init: initial bias of the similarities (SigLIP, https://arxiv.org/abs/2303.15343), or None
      for no such parameter.
    parallel_ratio: fraction of the captions that a decoder with `parallel=True` predicts at once in
      training, from the image alone (CapPa); in [0, 1).
    keep_ratio: fraction of the encoder's tokens that the decoder gets in training, in (0, 1].
    keep_order: order of the kept tokens: "sorted" as in the image, or "random".
    eval_keep: without a key, "all" tokens, or a "fixed", evenly spread fraction keep_ratio of them.
  """

  encoder: ViTConfig
  text: TextConfig | None = None
  decoder: QueryDecoderConfig | DecoderConfig | None = None
  embed_dim: int = None  # type: ignore[assignment]  # __post_init__ sets it
  log_scale_init: float = math.log(1 / 0.07)
  bias_init: float | None = None
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
    if self.text is None:
      self._check_without_text()
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
      raise ValueError("text=None and decoder=None leave an image tower; use its ViTConfig.")
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
      encoder: name of the image tower, see ViTConfig.from_name.
      text: name of the text tower, see TextConfig.from_name; None for none.
      decoder: name of the decoder, of DECODER_VARIANTS; None for none.
      preset: of PRESETS: how the parts compute.
      image_size: pixels.
      vocab_size: V, of text tower and decoder.
      text_len: tokens per text of the text tower.
      caption_len: queries of the decoder, or its longest caption.
      decoder_kind: "queries" as in OpenVision, "teacher_forced" as in OpenVision 2.
      embed_dim: E; None for that of the published pairs. Ignored without a text tower.
      encoder_options: fields of ViTConfig to set.
      text_options: fields of TextConfig to set, over those of the preset.
      decoder_options: fields of the decoder's config to set, over those of the preset.
      **options: other fields of VisionLanguageConfig to set, over those of the preset
        (parallel_ratio > 0 gives the decoder parallel=True), and fields to set in every part, e.g.
        dtype, remat, attention, scan.

    Raises:
      ValueError: an unknown name, or fields that do not fit together.
    """
    check_choice("preset", preset, PRESETS)
    check_choice("decoder_kind", decoder_kind, ("queries", "teacher_forced"))
    behavior = PRESETS[preset]
    own = behavior.model | {name: options[name] for name in _OPTIONS if name in options}
    both = {name: value for name, value in options.items() if name not in _OPTIONS}
    tower = ViTConfig.from_name(encoder, image_size, **(both | dict(encoder_options or {})))
    reader = None
    if text is not None:
      fields = both | dict(text_options or {})
      reader = TextConfig.from_name(text, vocab_size, text_len, preset, **fields)
    writer: QueryDecoderConfig | DecoderConfig | None = None
    if decoder is not None and decoder_kind == "queries":
      fields = both | dict(decoder_options or {})
      writer = QueryDecoderConfig.from_name(decoder, vocab_size, caption_len, **fields)
    elif decoder is not None:
      fields = both | behavior.decoder | {"parallel": own.get("parallel_ratio", 0) > 0}
      fields |= dict(decoder_options or {})
      writer = DecoderConfig.from_name(decoder, vocab_size, caption_len, **fields)
    if embed_dim is None:
      embed_dim = EMBED_DIMS.get(encoder.partition("/")[0], tower.width)
    own["embed_dim"] = tower.width if text is None else embed_dim
    return cls(encoder=tower, text=reader, decoder=writer, **own)

  @classmethod
  def openvision2(
    cls, image: str, decoder: str, *, max_len: int = 127, keep_ratio: float = 0.35, **options: Any
  ) -> "VisionLanguageConfig":
    """Return a published OpenVision 2, e.g. ("L/14", "L").

    Args:
      image: name of the image tower, see ViTConfig.from_name.
      decoder: name of the decoder, see DecoderConfig.from_name.
      max_len: longest caption.
      keep_ratio: fraction of the image tokens kept in training.
      **options: see `from_names`.
    """
    options |= {"decoder_kind": "teacher_forced", "keep_ratio": keep_ratio}
    return cls.from_names(image, None, decoder, caption_len=max_len, **options)

  @property
  def num_kept(self) -> int:
    """K: image tokens that the decoder gets in training."""
    return masking.num_kept(self.encoder.num_unmasked, self.keep_ratio)

  @property
  def can_embed_text(self) -> bool:
    """Whether images and texts share a space."""
    return self.text is not None

  @property
  def can_generate(self) -> bool:
    """Whether the decoder writes token by token, as `generate` needs."""
    return isinstance(self.decoder, DecoderConfig)


# Fields that `from_names` takes by their own name.
_OPTIONS = frozenset(
  field.name
  for field in dataclasses.fields(VisionLanguageConfig)
  if field.name not in ("encoder", "text", "decoder", "embed_dim")
)
