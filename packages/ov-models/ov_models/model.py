"""Vision-language model: an image encoder with a text tower, a caption decoder, or both.

With both parts it is OpenVision (https://arxiv.org/abs/2505.04601), without a text tower OpenVision
2 (https://arxiv.org/abs/2509.01644), without a decoder CLIP (https://arxiv.org/abs/2103.00020).
Other combinations are CoCa (https://arxiv.org/abs/2205.01917) and CapPa
(https://arxiv.org/abs/2306.07915).
"""

import dataclasses

from einops import rearrange
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ov_models import masking
from ov_models.blocks import axes, linear, normal
from ov_models.contexts import any_mesh
from ov_models.decoder import Decoder, DecoderConfig
from ov_models.model_config import VisionLanguageConfig
from ov_models.query_decoder import QueryDecoder, QueryDecoderConfig
from ov_models.shapes import AnyArray
from ov_models.text import TextEncoder
from ov_models.vit import ViT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Embedded:
  """Embeddings and features of a batch of images or texts.

  Attributes:
    unit: float32 L2-normalised embeddings.
    raw: float32 embeddings before normalisation.
    tokens: features before the final norm, in compute dtype: patches of images, or text tokens
      without the [CLS] column of pool "last".
    pooled: pooled features of the tower, before the projection head.
  """

  unit: Float[Array, "*B E"]
  raw: Float[Array, "*B E"]
  tokens: Float[Array, "*B T D"]
  pooled: Float[Array, "*B D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionLanguageOutput:
  """Output of a vision-language model.

  Attributes:
    image: embedded images with all tokens of the tower.
    text: embedded texts with arrays [B, K, ...] for K texts per image; None without texts.
    hidden: float32 hidden states of the caption after the norm of the decoder; None without a
      decoder or without the captions that it reads.
  """

  image: Embedded
  text: Embedded | None
  hidden: Float[Array, "B T D"] | None


class VisionLanguageModel(nnx.Module):
  """Image encoder, text tower and caption decoder. Create it with `init` and `bind`."""

  def __init__(self, config: VisionLanguageConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    width, f32 = config.encoder.width, jnp.dtype("float32")
    self.encoder = ViT(config.encoder, rngs=rngs)
    if (text := config.text) is not None:
      self.text = TextEncoder(text, rngs=rngs)

      def head(d: int, std: float, *, bias: bool = False) -> nnx.Linear:
        return linear(d, config.embed_dim, normal(std), ("embed", None), f32, rngs, bias=bias)

      if config.image_head:
        self.image_head = head(width, 0.02)
      self.text_head = head(text.width, text.width**-0.5, bias=config.text_head_bias)
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
    images: Float[AnyArray, "B H W 3"],
    ids: Int[AnyArray, "B T"] | None = None,
    key: PRNGKeyArray | None = None,
    *,
    texts: Int[AnyArray, "B K S"] | None = None,
  ) -> VisionLanguageOutput:
    """Run every part whose input is given.

    Args:
      images: normalised images.
      ids: captions for a teacher-forced decoder.
      key: random key for training: patch masking, kept tokens and parallel prediction. Without it,
        the model is deterministic.
      texts: K texts per image for the text tower; a query decoder reads the first one.
    """
    image, kept = self.encode(images, key)
    text, first = None, None
    if texts is not None:
      flat = self.encode_text(rearrange(texts, "b k t -> (b k) t"))
      text = jax.tree.map(lambda x: rearrange(x, "(b k) ... -> b k ...", k=texts.shape[1]), flat)
      first = text.tokens[:, 0]
    hidden = None
    if self.config.decoder is not None and (ids is not None or not self.config.can_generate):
      parallel_key = None if key is None else jax.random.split(key)[1]
      if parallel_key is not None and self.config.keep_ratio < 1:  # `encode` has used this key
        parallel_key = jax.random.fold_in(parallel_key, 1)
      hidden = self.caption_hidden(kept, text_tokens=first, ids=ids, key=parallel_key)
    return VisionLanguageOutput(image, text, hidden)

  @any_mesh()
  def encode_image(
    self, images: Float[AnyArray, "B H W 3"], key: PRNGKeyArray | None = None
  ) -> Embedded:
    """Embed normalised images; `key` as for ViT."""
    with jax.named_scope("encoder"):
      out = self.encoder(images, key)
    raw = out.pooled.astype(jnp.float32)
    if self.config.text is not None and self.config.image_head:
      raw = self.image_head(raw)
    return Embedded(unit=_unit(raw), raw=raw, tokens=out.tokens, pooled=out.pooled)

  @any_mesh()
  def encode_text(self, ids: Int[AnyArray, "B T"]) -> Embedded:
    """Embed token ids, as for TextEncoder.

    Raises:
      ValueError: if the model has no text tower.
    """
    if (text := self.config.text) is None:
      raise ValueError("this model has no text tower; build it with a TextConfig as `text`.")
    with jax.named_scope("text"):
      out = self.text(ids)
    raw = self.text_head(out.pooled)
    tokens = out.tokens[:, :-1] if text.pool == "last" else out.tokens
    return Embedded(unit=_unit(raw), raw=raw, tokens=tokens, pooled=out.pooled)

  @any_mesh()
  def encode(
    self, images: Float[AnyArray, "B H W 3"], key: PRNGKeyArray | None = None
  ) -> tuple[Embedded, Float[Array, "B K E"]]:
    """Embed images; also return their tokens [B, K, E] for the decoder."""
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
    image_tokens: Float[AnyArray, "B K E"],
    *,
    text_tokens: Float[AnyArray, "B T W"] | None = None,
    ids: Int[AnyArray, "B S"] | None = None,
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "B Q D"]:
    """Return the hidden states that predict a caption; logits are hidden @ head_kernel.

    Args:
      image_tokens: image tokens from `encode`.
      text_tokens: text tokens from `encode_text` of a text other than the caption, for a query
        decoder of a model with a text tower.
      ids: caption ids for a teacher-forced decoder.
      key: random key that selects the captions to predict in parallel; None for no caption.

    Returns:
      float32 hidden states. Row i of a query decoder predicts caption token i; row i of a
      teacher-forced decoder predicts token i + 1.

    Raises:
      ValueError: if the model has no decoder, or an input of the decoder is missing.
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
  def head_kernel(self) -> Float[AnyArray, "D V"]:
    """Return the float32 head weights of the decoder; raise ValueError without a decoder."""
    self._decoder_config()
    return self.decoder.head.kernel[...]

  def logits(self, hidden: Float[AnyArray, "*B D"]) -> Float[Array, "*B V"]:
    """Return float32 logits. To save memory, pass hidden and head_kernel to the loss instead."""
    return jnp.einsum("...d,dv->...v", hidden, self.head_kernel, preferred_element_type=jnp.float32)

  def _decoder_config(self) -> QueryDecoderConfig | DecoderConfig:
    if self.config.decoder is None:
      raise ValueError("this model has no decoder; build it with a config as `decoder`.")
    return self.config.decoder


def _unit(z: jax.Array) -> jax.Array:
  """Return z / (|z| + 1e-8)."""
  return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
