"""What OpenVision training is: two towers, a caption decoder, and a weighted mix of losses."""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from apps.trainer.model_options import check_options
from apps.trainer.step import LossOutput
from ov_data import TextProcessor, TextSpec, Tokenizer
import ov_losses
import ov_models

Params = Any
Batch = dict[str, jax.Array]


class Weights(NamedTuple):
  """Factors on the losses; 0 leaves one out."""

  clip: float
  siglip: float
  caption: float


def two_towers_config(model: ConfigDict, *, vocab_size: int) -> ov_models.VisionLanguageConfig:
  """The model of `config.model`.

  Args:
    model: the `model` part of a configuration.
    vocab_size: entries of the tokenizer.

  Raises:
    ValueError: sizes that do not fit each other, or an unknown variant.
  """
  rows = model.vocab_size or -(-vocab_size // 128) * 128  # whole tiles for the head product
  if rows < vocab_size:
    raise ValueError(
      f"config.model.vocab_size={rows} is smaller than the tokenizer's {vocab_size} entries; "
      "set it to at least that, or to 0 to take the tokenizer's size"
    )
  if model.scale_init <= 0:
    raise ValueError(f"config.model.scale_init={model.scale_init}; expected a number above 0")
  queries = model.decoder_kind == "queries"
  decoder = ov_models.QueryDecoderConfig if queries else ov_models.DecoderConfig
  check_options("config.model.encoder_options", model.encoder_options, ov_models.ViTConfig)
  check_options("config.model.text_options", model.text_options, ov_models.TextConfig)
  check_options("config.model.decoder_options", model.decoder_options, decoder)
  return ov_models.VisionLanguageConfig.from_names(
    model.encoder,
    model.text or None,
    model.decoder or None,
    image_size=model.image_size,
    vocab_size=rows,
    text_len=model.token_len,
    caption_len=model.caption_len,
    decoder_kind=model.decoder_kind,
    preset=model.preset,
    embed_dim=model.embed_dim or None,
    log_scale_init=math.log(model.scale_init),
    bias_init=model.bias_init,
    parallel_ratio=model.parallel_ratio,
    encoder_options=model.encoder_options.to_dict(),
    text_options=model.text_options.to_dict(),
    decoder_options=model.decoder_options.to_dict(),
    dtype=model.dtype,
    remat=model.remat,
    attention=model.attention,
  )


@dataclasses.dataclass(frozen=True)
class ClipTask:
  """Contrastive and caption training, arXiv 2505.04601.

  A batch holds `alt_ids` (the short text), `sentence_ids` (one sentence of the long one; with
  `sentence_positive`), and `caption_ids` (the long text; with a decoder).
  """

  model: ov_models.VisionLanguageConfig
  weights: Weights
  pad_id: int
  mesh: jax.sharding.Mesh
  name: str
  token_len: int
  caption_len: int
  alt_keys: tuple[str, ...]
  caption_keys: tuple[str, ...]
  sentence_positive: bool = True
  form: str = "gathered"
  chunk: int | None = None
  mask_duplicates: bool = False
  max_scale: float | None = None
  label_smoothing: float = 0.0
  z_loss: float = 0.0

  @classmethod
  def from_config(
    cls, config: ConfigDict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
  ) -> "ClipTask":
    """The task of a stage; raises ValueError where its settings are impossible."""
    model, loss, inputs = config.model, config.loss, config.input
    weights = Weights(loss.clip, loss.siglip, loss.caption)
    towers = two_towers_config(model, vocab_size=tokenizer.vocab_size)
    _check_weights(weights, towers)
    if loss.max_scale is not None:
      _check_max_scale(loss.max_scale)
    if towers.text and towers.text.pool == "last" and tokenizer.cls_id is None:
      raise ValueError(
        "the text tower reads the last token, and the tokenizer has no [CLS] to put there; "
        'set config.model.text_options={"pool": "mean"} or use a vocabulary with [CLS]'
      )
    return cls(
      towers,
      weights,
      tokenizer.pad_id,
      mesh,
      " + ".join(part for part in (model.encoder, model.text, model.decoder) if part),
      model.token_len,
      model.caption_len,
      tuple(inputs.alt_keys),
      tuple(inputs.caption_keys),
      inputs.sentence_positive and bool(weights.clip or weights.siglip),
      loss.form,
      loss.chunk or None,
      loss.mask_duplicates,
      loss.max_scale,
      loss.label_smoothing,
      loss.z_loss,
    )

  @property
  def image_size(self) -> int:
    return self.model.encoder.image_size

  @property
  def text_len(self) -> int:
    return self.token_len

  @property
  def contrastive(self) -> bool:
    return bool(self.weights.clip or self.weights.siglip)

  @functools.cached_property
  def text_specs(self) -> Mapping[str, TextSpec]:
    """The texts of a batch; where a record lacks one kind of text, the other stands in."""
    specs = {}
    long_texts = self.sentence_positive or self.model.decoder is not None
    if self.model.text is not None:
      cls = self.model.text.pool == "last"
      instead = self.caption_keys if long_texts else ()
      # An alt text of punctuation alone is trained on, as in the released code.
      specs["alt_ids"] = TextSpec(
        self.alt_keys, self.token_len, append_cls=cls, fallback=instead, needs_words=False
      )
      if self.sentence_positive:
        specs["sentence_ids"] = TextSpec(
          self.caption_keys,
          self.token_len,
          pick="sentence",
          append_cls=cls,
          fallback=self.alt_keys,
        )
    if self.model.decoder is not None:
      instead = self.alt_keys if self.model.text is not None else ()
      specs["caption_ids"] = TextSpec(self.caption_keys, self.caption_len, fallback=instead)
    return specs

  def text_processor(self, tokenizer: Tokenizer) -> TextProcessor | None:
    """How texts reach the text tower, for evaluation and for the artefact beside the params."""
    text = self.model.text
    if text is None:
      return None
    return TextProcessor(
      tokenizer,
      self.token_len,
      append_cls=text.pool == "last",
      pool=text.pool,
      padding=text.padding,
    )

  @property
  def batch_keys(self) -> tuple[str, ...]:
    return ("image", "valid", "index", *self.text_specs)

  def init(self, key: jax.Array) -> Params:
    return ov_models.init(self.model, key)

  def abstract_params(self) -> Params:
    return ov_models.abstract_params(self.model)

  def logical_axes(self) -> Params:
    return ov_models.logical_axes(self.model)

  @functools.cached_property
  def flops_per_example(self) -> float:
    """Model FLOPs of forward and backward, without rematerialisation."""
    texts = 2 if self.sentence_positive else 1
    return ov_models.flops_per_example(self.model, num_texts=texts)

  def loss(self, params: Params, batch: Batch, key: jax.Array) -> LossOutput:
    """Weighted sum of the losses; weight is the number of good examples."""
    rows, captions = self.embed(params, batch, key)
    out = self.combine(params, rows)
    metrics = out.metrics | captions.metrics
    return LossOutput(out.loss + captions.loss, out.weight, metrics)

  def embed(
    self, params: Params, batch: Batch, key: jax.Array
  ) -> tuple[dict[str, jax.Array], LossOutput]:
    """What the contrastive losses need of each row, and the loss that rows have on their own.

    Returns:
      rows: image [B, E], texts [B, K, E], valid [B], groups int32 [B, K]; and the caption loss.
    """
    model = ov_models.bind(self.model, params)
    tower_key, caption_key = jax.random.split(key)
    image = model.encode_image(batch["image"], tower_key)
    rows: dict[str, jax.Array] = {"valid": batch["valid"]}
    alt_tokens = None
    if self.model.text is not None:
      names = [name for name in ("alt_ids", "sentence_ids") if name in batch]
      ids = jnp.stack([batch[name] for name in names], axis=1)  # [B, K, T]
      text = model.encode_text(ids.reshape(-1, ids.shape[2]))
      split = lambda x: x.reshape(*ids.shape[:2], *x.shape[1:])
      alt_tokens = split(text.tokens)[:, 0]
      rows |= {"image": image.unit, "texts": split(text.unit)}
      rows["norms"] = jnp.stack([_norm(image.raw), _norm(split(text.raw)[:, 0])], axis=1)
      if self.mask_duplicates:
        rows["groups"] = ov_losses.text_groups(ids.swapaxes(0, 1)).T
    return rows, self._captions(model, batch, image.tokens, alt_tokens, caption_key)

  def _captions(
    self,
    model: ov_models.VisionLanguageModel,
    batch: Batch,
    image_tokens: jax.Array,
    alt_tokens: jax.Array | None,
    key: jax.Array | None,
  ) -> LossOutput:
    """The weighted caption loss; its weight is the number of target tokens."""
    if not self.weights.caption:
      return LossOutput(jnp.zeros(()), jnp.zeros(()), {})
    hidden = model.caption_hidden(
      image_tokens, text_tokens=alt_tokens, ids=batch["caption_ids"], key=key
    )
    targets, mask = self._targets(batch)
    result = ov_losses.caption_cross_entropy(
      hidden,
      model.head_kernel,
      targets,
      mask,
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
      batch_shards=self.mesh.shape["data"] * self.mesh.shape["fsdp"],
    )
    metrics = {
      "caption_nll": result.nll,
      "token_accuracy": result.num_correct / jnp.maximum(result.num_tokens, 1),
    }
    return LossOutput(self.weights.caption * result.loss, result.num_tokens, metrics)

  def project(self, params: Params) -> Params:
    """Params with the temperature clipped to [0, log(max_scale)], as open_clip does."""
    if self.max_scale is None or "log_scale" not in params:
      return params
    return params | {"log_scale": ov_losses.clamp_log_scale(params["log_scale"], self.max_scale)}

  def combine(self, params: Params, rows: dict[str, jax.Array]) -> LossOutput:
    """The weighted contrastive losses of all rows of a batch."""
    valid = rows["valid"]
    count = valid.sum().astype(jnp.float32)
    if not self.contrastive:
      return LossOutput(jnp.zeros(()), count, {})
    scale = jnp.exp(params["log_scale"])
    image, texts = rows["image"], rows["texts"].swapaxes(0, 1)  # [K, B, E]
    options: dict[str, Any] = {
      "valid": valid,
      "text_groups": rows["groups"].T if self.mask_duplicates else None,
      "form": self.form,
      "mesh": self.mesh,
      "chunk": self.chunk,
    }
    norms = (rows["norms"] * valid[:, None]).sum(0) / jnp.maximum(count, 1)
    loss = jnp.zeros(())
    metrics = {"scale": scale, "image_norm": norms[0], "text_norm": norms[1]}
    if self.weights.clip:
      out = ov_losses.contrastive_softmax(image, texts, scale, **options)
      loss += self.weights.clip * out.loss
      metrics |= {"clip_loss": out.loss} | _metrics(out)
    if self.weights.siglip:
      bias = params.get("bias", jnp.zeros(()))
      out = ov_losses.contrastive_sigmoid(image, texts, scale, bias, **options)
      loss += self.weights.siglip * out.loss
      metrics |= {"siglip_loss": out.loss, "bias": bias} | _metrics(out)
    return LossOutput(loss, count, metrics)

  def score(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood [B] and number of target tokens [B] of each caption."""
    model = ov_models.bind(self.model, params)
    image_tokens = model.encode_image(batch["image"]).tokens
    alt_tokens = model.encode_text(batch["alt_ids"]).tokens if self.model.text else None
    hidden = model.caption_hidden(image_tokens, text_tokens=alt_tokens, ids=batch["caption_ids"])
    targets, mask = self._targets(batch)
    log_likelihood = ov_losses.sequence_log_likelihood(hidden, model.head_kernel, targets, mask)
    return -log_likelihood, mask.sum(axis=1)

  def _targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Query or position i writes token i + 1: the begin token is never a target."""
    targets, mask = ov_losses.shift_left(batch["caption_ids"], self.pad_id)
    return targets, mask * batch["valid"][:, None]


def _check_weights(weights: Weights, model: ov_models.VisionLanguageConfig) -> None:
  for name, weight in weights._asdict().items():
    if weight < 0:
      raise ValueError(f"config.loss.{name}={weight}; expected 0 or more")
  if not any(weights):
    raise ValueError("config.loss: every weight is 0; set clip, siglip or caption")
  if (weights.clip or weights.siglip) and model.text is None:
    raise ValueError("a contrastive loss needs a text tower; set config.model.text")
  if weights.caption and model.decoder is None:
    raise ValueError("config.loss.caption needs a decoder; set config.model.decoder")
  if model.decoder is not None and not weights.caption:
    raise ValueError(
      'config.model.decoder is set and config.loss.caption is 0; set config.model.decoder=""'
    )


def _check_max_scale(max_scale: float) -> None:
  if not 1 <= max_scale < math.inf:
    raise ValueError(
      f"config.loss.max_scale={max_scale}; expected at least 1, for example 100, or None for no "
      "limit"
    )


def _norm(x: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(jnp.linalg.norm(x, axis=-1))


def _metrics(out: ov_losses.ContrastiveLoss) -> dict[str, jax.Array]:
  return {
    name: getattr(out, name)
    for name in ("image_top1", "text_top1", "mean_positive", "mean_negative")
  }
