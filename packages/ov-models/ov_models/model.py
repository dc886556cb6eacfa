"""An image encoder with a text tower, a caption decoder, or both.

With both it is OpenVision (https://arxiv.org/abs/2505.04601), without a text tower OpenVision 2
(https://arxiv.org/abs/2509.01644), without a decoder CLIP (https://arxiv.org/abs/2103.00020). Other
combinations are CoCa (https://arxiv.org/abs/2205.01917) and CapPa
(https://arxiv.org/abs/2306.07915). The losses that train it are not part of it.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models import masking
from ov_models.blocks import axes, linear, normal
from ov_models.config import check_choice, check_finite, check_part, check_ratio, check_size
from ov_models.contexts import any_mesh
from ov_models.decoder import Decoder, DecoderConfig
from ov_models.presets import EMBED_DIMS, PRESETS
from ov_models.query_decoder import QueryDecoder, QueryDecoderConfig
from ov_models.text import TextConfig, TextEncoder
from ov_models.vit import ViT, ViTConfig


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
      fields = both | behavior.text | dict(text_options or {})
      reader = TextConfig.from_name(text, vocab_size, text_len, **fields)
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
  def openvision(
    cls, image: str, text: str | None, decoder: str | None, **options: Any
  ) -> "VisionLanguageConfig":
    """Return a published OpenVision, e.g. ("L/14", "L", "L"); `options` as for `from_names`."""
    return cls.from_names(image, text, decoder, **options)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionLanguageOutput:
  """What a model makes of a batch.

  Attributes:
    image: the embedded images, with all tokens of the tower.
    text: the embedded texts, every array [B, K, ...] for K texts per image; None without texts.
    hidden: float32 [B, T, D], hidden states of the caption after the decoder's norm; None without a
      decoder, or without the captions that it reads.
  """

  image: Embedded
  text: Embedded | None
  hidden: jax.Array | None


class VisionLanguageModel(nnx.Module):
  """Image encoder, text tower and caption decoder. Build it by `init` and `bind`."""

  def __init__(self, config: VisionLanguageConfig, *, rngs: nnx.Rngs) -> None:
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
  def __call__(
    self,
    images: jax.Array,
    ids: jax.Array | None = None,
    key: jax.Array | None = None,
    *,
    texts: jax.Array | None = None,
  ) -> VisionLanguageOutput:
    """Run every part that has its input.

    Args:
      images: float32 [B, H, W, 3], normalised.
      ids: int32 [B, T], the captions; read by a teacher-forced decoder.
      key: randomness of training: patches masked, tokens kept, captions predicted in parallel.
        Without it nothing is random.
      texts: int32 [B, K, T], K texts per image for the text tower; the first of them is what a
        decoder with learned queries reads.
    """
    image, kept = self.encode(images, key)
    text, first = None, None
    if texts is not None:
      flat = self.encode_text(texts.reshape(-1, texts.shape[2]))
      text = jax.tree.map(lambda x: x.reshape(*texts.shape[:2], *x.shape[1:]), flat)
      first = text.tokens[:, 0]
    hidden = None
    if self.config.decoder is not None and (ids is not None or not self.config.can_generate):
      parallel_key = None if key is None else jax.random.split(key)[1]
      if parallel_key is not None and self.config.keep_ratio < 1:  # `encode` has drawn from it
        parallel_key = jax.random.fold_in(parallel_key, 1)
      hidden = self.caption_hidden(kept, text_tokens=first, ids=ids, key=parallel_key)
    return VisionLanguageOutput(image, text, hidden)

  @any_mesh()
  def encode_image(self, images: jax.Array, key: jax.Array | None = None) -> Embedded:
    """Embed images, float32 [B, H, W, 3], normalised; `key` as for ViT."""
    with jax.named_scope("encoder"):
      out = self.encoder(images, key)
    raw = out.pooled.astype(jnp.float32)
    if self.config.text is not None:
      raw = self.image_head(raw)
    return Embedded(unit=_unit(raw), raw=raw, tokens=out.tokens, pooled=out.pooled)

  @any_mesh()
  def encode_text(self, ids: jax.Array) -> Embedded:
    """Embed texts, int32 [B, T], as for TextEncoder.

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
  def encode(self, images: jax.Array, key: jax.Array | None = None) -> tuple[Embedded, jax.Array]:
    """Embed images; return also the tokens [B, K, E] that the decoder gets of them."""
    mask_key, keep_key = (None, None) if key is None else jax.random.split(key)
    image = self.encode_image(images, mask_key)
    config, tokens = self.config, image.tokens
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
    return image, tokens

  @any_mesh()
  def caption_hidden(
    self,
    image_tokens: jax.Array,
    *,
    text_tokens: jax.Array | None = None,
    ids: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Return the hidden states that predict a caption; times `head_kernel` they are the logits.

    Args:
      image_tokens: [B, K, E] of `encode`.
      text_tokens: [B, T, W] of `encode_text`, of another text than the caption. For a decoder with
        queries, if there is a text tower.
      ids: int32 [B, T], the caption. For a teacher-forced decoder.
      key: randomness of training: which captions are predicted in parallel. Without it, none.

    Returns:
      float32 [B, Q, D] of a decoder with queries, where row i predicts caption token i;
      [B, T, D] of a teacher-forced one, where row i predicts token i + 1.

    Raises:
      ValueError: there is no decoder, or one of its inputs is missing.
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

  @property
  def head_kernel(self) -> jax.Array:
    """float32 [D, V], of the decoder; ValueError if there is none."""
    self._decoder_config()
    return self.decoder.head.kernel[...]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> float32 [B, T, V]. Large: a loss should take hidden and head_kernel."""
    return jnp.einsum("...d,dv->...v", hidden, self.head_kernel, preferred_element_type=jnp.float32)

  def _decoder_config(self) -> QueryDecoderConfig | DecoderConfig:
    if self.config.decoder is None:
      raise ValueError("this model has no decoder; build it with a config as `decoder`.")
    return self.config.decoder


def _unit(z: jax.Array) -> jax.Array:
  """z / (|z| + 1e-8)."""
  return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
