"""OpenVision: an image and a text tower into one space, and a caption decoder beside them.

OpenVision: https://arxiv.org/abs/2505.04601. The same module, with another decoder or without a
part, is CLIP (https://arxiv.org/abs/2103.00020), CoCa (https://arxiv.org/abs/2205.01917) and CapPa
(https://arxiv.org/abs/2306.07915); which losses it is trained by is not its business.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models.blocks import axes, linear, normal
from ov_models.config import check_choice, check_finite, check_part, check_ratio, check_size
from ov_models.contexts import any_mesh
from ov_models.decoder import Decoder, DecoderConfig
from ov_models.query_decoder import QueryDecoder, QueryDecoderConfig
from ov_models.text import TextConfig, TextEncoder
from ov_models.vit import ViT, ViTConfig

# E of the published pairs, by the variant of the image tower; elsewhere the width of that tower.
EMBED_DIMS = {"Ti": 192, "S": 384, "B": 512, "L": 768, "So400m": 1152, "H": 1024, "g": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowersConfig:
  """Towers, decoder, and what joins them.

  Attributes:
    encoder: the image tower.
    text: the text tower; None trains the image tower by captions alone. Then there are no heads
      and no scale, and the embedding of an image is its pooled vector.
    decoder: the caption decoder: learned queries or teacher-forced; None for contrast alone.
    embed_dim: E, of the shared space; the encoder's width without a text tower.
    log_scale_init: first value of the log-temperature; similarities are multiplied by its exp.
    bias_init: first value of the bias added to similarities (SigLIP,
      https://arxiv.org/abs/2303.15343), or None for no such parameter.
    parallel_ratio: share of captions that a decoder with `parallel=True` predicts at once in
      training, from the image alone (CapPa); in [0, 1).
  """

  encoder: ViTConfig
  text: TextConfig | None
  decoder: QueryDecoderConfig | DecoderConfig | None
  embed_dim: int
  log_scale_init: float = math.log(1 / 0.07)
  bias_init: float | None = None
  parallel_ratio: float = 0.0

  def __post_init__(self) -> None:
    check_part("encoder", self.encoder, ViTConfig)
    if self.text is not None:
      check_part("text", self.text, TextConfig)
    if self.decoder is not None:
      check_part("decoder", self.decoder, QueryDecoderConfig, DecoderConfig)
    check_size("embed_dim", self.embed_dim)
    check_finite("log_scale_init", self.log_scale_init)
    if self.bias_init is not None:
      check_finite("bias_init", self.bias_init)
    if self.text is None:
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
    check_ratio("parallel_ratio", self.parallel_ratio, zero=True, one=False)
    parallel = isinstance(self.decoder, DecoderConfig) and self.decoder.parallel
    if self.parallel_ratio > 0 and not parallel:
      raise ValueError(
        f"parallel_ratio={self.parallel_ratio} needs a teacher-forced decoder with parallel=True; "
        f"decoder is {self.decoder!r}."
      )

  @classmethod
  def openvision(
    cls,
    image: str,
    text: str | None,
    decoder: str | None,
    *,
    image_size: int = 224,
    vocab_size: int = 32000,
    text_len: int = 80,
    caption_len: int = 128,
    decoder_kind: Literal["queries", "teacher_forced"] = "queries",
    preset: Literal["default", "openvision_released", "clip"] = "default",
    embed_dim: int | None = None,
    log_scale_init: float = math.log(1 / 0.07),
    bias_init: float | None = None,
    parallel_ratio: float = 0.0,
    encoder_options: Mapping[str, Any] | None = None,
    text_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
    **both: Any,
  ) -> "TwoTowersConfig":
    """A published triple of sizes, e.g. ("L/14", "L", "L").

    Args:
      image: name of the image tower, as for ViTConfig.from_name.
      text: name of the text tower, as for TextConfig.from_name; None for none.
      decoder: name of the decoder, of DECODER_VARIANTS; None for none.
      image_size: pixels.
      vocab_size: V, of text tower and decoder.
      text_len: tokens per text of the text tower.
      caption_len: queries of the decoder, or its longest caption.
      decoder_kind: "queries" as published, or "teacher_forced".
      preset: of the text tower, see TextConfig.from_name; "openvision_released" is the published
        model.
      embed_dim: E; None for that of the published pairs. Of no account without a text tower.
      log_scale_init: see TwoTowersConfig.
      bias_init: see TwoTowersConfig.
      parallel_ratio: see TwoTowersConfig; above 0 the decoder gets parallel=True.
      encoder_options: fields of ViTConfig to set.
      text_options: fields of TextConfig to set, over those of the preset.
      decoder_options: fields of the decoder's config to set.
      **both: fields to set in every part, e.g. dtype, remat, attention, scan.
    """
    check_choice("decoder_kind", decoder_kind, ("queries", "teacher_forced"))
    tower = ViTConfig.from_name(image, image_size, **(both | dict(encoder_options or {})))
    options = both | dict(decoder_options or {})
    writer: QueryDecoderConfig | DecoderConfig | None = None
    if decoder is not None and decoder_kind == "queries":
      writer = QueryDecoderConfig.from_name(decoder, vocab_size, caption_len, **options)
    elif decoder is not None:
      options = {"parallel": parallel_ratio > 0} | options
      writer = DecoderConfig.from_name(decoder, vocab_size, caption_len, **options)
    reader = None
    if text is None:
      embed_dim = tower.width
    else:
      fields = both | dict(text_options or {})
      reader = TextConfig.from_name(text, vocab_size, text_len, preset, **fields)
      if embed_dim is None:
        embed_dim = EMBED_DIMS.get(image.partition("/")[0], tower.width)
    return cls(
      encoder=tower,
      text=reader,
      decoder=writer,
      embed_dim=embed_dim,
      log_scale_init=log_scale_init,
      bias_init=bias_init,
      parallel_ratio=parallel_ratio,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Embedded:
  """What a tower makes of its input.

  Attributes:
    unit: float32 [B, E] of length 1.
    raw: float32 [B, E] before the division by its length.
    tokens: [B, T, D] before the final norm, in compute dtype. An image's patches; a text's tokens
      without the [CLS] column of pool "last".
    pooled: [B, D] before the head: the features of a tower on its own.
  """

  unit: jax.Array
  raw: jax.Array
  tokens: jax.Array
  pooled: jax.Array


class TwoTowers(nnx.Module):
  """Image tower, text tower and caption decoder. Build it by `init` and `bind`, not by hand."""

  def __init__(self, config: TwoTowersConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    width, f32 = config.encoder.width, jnp.dtype("float32")
    self.encoder = ViT(config.encoder, rngs=rngs)
    if (text := config.text) is not None:
      self.text = TextEncoder(text, rngs=rngs)

      def head(d: int, std: float) -> nnx.Linear:
        return linear(d, config.embed_dim, normal(std), ("embed", None), f32, rngs, bias=False)

      self.image_head = head(width, 0.02)
      self.text_head = head(text.width, text.width**-0.5)
      self.log_scale = nnx.Param(jnp.full((), config.log_scale_init, f32), **axes())
    bias = config.bias_init
    self.bias = None if bias is None else nnx.Param(jnp.full((), bias, f32), **axes())
    if isinstance(config.decoder, QueryDecoderConfig):
      text_width = None if text is None else text.width
      self.decoder: QueryDecoder | Decoder = QueryDecoder(
        config.decoder, width, text_width, rngs=rngs
      )
    elif config.decoder is not None:
      self.decoder = Decoder(config.decoder, width, rngs=rngs)

  @any_mesh()
  def encode_image(self, images: jax.Array, key: jax.Array | None = None) -> Embedded:
    """float32 [B, H, W, 3], normalised, to its embedding; `key` as for ViT."""
    with jax.named_scope("encoder"):
      out = self.encoder(images, key)
    raw = out.pooled.astype(jnp.float32)
    if self.config.text is not None:
      raw = self.image_head(raw)
    return Embedded(unit=_unit(raw), raw=raw, tokens=out.tokens, pooled=out.pooled)

  @any_mesh()
  def encode_text(self, ids: jax.Array) -> Embedded:
    """int32 [B, T], as for TextEncoder, to its embedding.

    Raises:
      ValueError: there is no text tower.
    """
    if (text := self.config.text) is None:
      raise ValueError("this model has no text tower; build it with a TextConfig as `text`.")
    with jax.named_scope("text"):
      out = self.text(ids)
    raw = self.text_head(out.pooled)
    tokens = out.tokens[:, :-1] if text.pool == "last" else out.tokens
    return Embedded(unit=_unit(raw), raw=raw, tokens=tokens, pooled=out.pooled)

  @any_mesh()
  def caption_hidden(
    self,
    image_tokens: jax.Array,
    *,
    text_tokens: jax.Array | None = None,
    ids: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Hidden states that predict a caption, whose product with `head_kernel` are the logits.

    Args:
      image_tokens: [B, K, E] as `encode_image` gives them.
      text_tokens: [B, T, W] as `encode_text` gives them, of a text beside the caption. For a
        decoder with queries, if there is a text tower.
      ids: int32 [B, T], the caption. For a teacher-forced decoder.
      key: randomness of training: which captions are predicted in parallel. Without it, none.

    Returns:
      float32 [B, Q, D] of a decoder with queries, where row i predicts caption token i;
      [B, T, D] of a teacher-forced one, where row i predicts token i + 1.

    Raises:
      ValueError: there is no decoder, or what it reads is missing.
    """
    config = self._decoder_config()
    with jax.named_scope("decoder"):
      if isinstance(self.decoder, QueryDecoder):
        return self.decoder(image_tokens, text_tokens if self.config.text else None)
      if ids is None:
        raise ValueError(f"ids=None, but a {type(config).__name__} reads the caption; pass ids.")
      parallel = None
      if key is not None and (ratio := self.config.parallel_ratio) > 0:
        parallel = jax.random.bernoulli(key, ratio, ids.shape[:1])
      return self.decoder(image_tokens, ids, parallel)

  @any_mesh()
  def encode(self, images: jax.Array, key: jax.Array | None = None) -> tuple[Embedded, jax.Array]:
    """What `encode_image` gives, and the tokens that the decoder reads: all of them."""
    image = self.encode_image(images, key)
    return image, image.tokens

  @property
  def head_kernel(self) -> jax.Array:
    """float32 [D, V], of the decoder; ValueError if there is none."""
    self._decoder_config()
    return self.decoder.head.kernel[...]

  def _decoder_config(self) -> QueryDecoderConfig | DecoderConfig:
    if self.config.decoder is None:
      raise ValueError("this model has no decoder; build it with a config as `decoder`.")
    return self.config.decoder


def _unit(z: jax.Array) -> jax.Array:
  """z / (|z| + 1e-8)."""
  return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
