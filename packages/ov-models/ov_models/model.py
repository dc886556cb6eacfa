"""An image encoder with a text tower, a caption decoder, or both.

With both it is OpenVision (https://arxiv.org/abs/2505.04601), without a text tower OpenVision 2
(https://arxiv.org/abs/2509.01644), without a decoder CLIP (https://arxiv.org/abs/2103.00020). Other
combinations are CoCa (https://arxiv.org/abs/2205.01917) and CapPa
(https://arxiv.org/abs/2306.07915). The losses that train it are not part of it.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from ov_models import masking
from ov_models.blocks import axes, linear, normal
from ov_models.contexts import any_mesh
from ov_models.decoder import Decoder, DecoderConfig
from ov_models.model_config import VisionLanguageConfig
from ov_models.query_decoder import QueryDecoder, QueryDecoderConfig
from ov_models.text import TextEncoder
from ov_models.vit import ViT


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
