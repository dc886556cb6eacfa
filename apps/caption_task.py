"""What caption training is: the model, the loss, and what a batch means to them."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from apps.trainer.model_options import check_options
from apps.trainer.step import LossOutput
from ov_data import Tokenizer
import ov_losses
import ov_models

Params = Any


def captioner_config(model: ConfigDict, *, vocab_size: int) -> ov_models.VisionLanguageConfig:
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
  if model.token_len < 3:
    raise ValueError(f"config.model.token_len={model.token_len}; expected at least 3")
  check_options("config.model.encoder_options", model.encoder_options, ov_models.ViTConfig)
  check_options("config.model.decoder_options", model.decoder_options, ov_models.DecoderConfig)
  return ov_models.VisionLanguageConfig.openvision2(
    model.encoder,
    model.decoder,
    image_size=model.image_size,
    vocab_size=rows,
    max_len=model.token_len - 1,
    preset=model.preset,
    keep_ratio=model.keep_ratio,
    encoder_options=model.encoder_options.to_dict(),
    decoder_options=model.decoder_options.to_dict(),
    dtype=model.dtype,
    remat=model.remat,
    attention=model.attention,
  )


@dataclasses.dataclass(frozen=True)
class CaptionTask:
  """Next-token captioning on image tokens, arXiv 2509.01644."""

  model: ov_models.VisionLanguageConfig
  pad_id: int
  name: str = "captioner"
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  caption_weight: float = 1.0
  batch_shards: int = 1  # parts of the batch on different devices, a hint for the loss

  @classmethod
  def from_config(
    cls, config: ConfigDict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
  ) -> "CaptionTask":
    """The task of a stage; raises ValueError where config.model is impossible."""
    model = config.model
    return cls(
      captioner_config(model, vocab_size=tokenizer.vocab_size),
      tokenizer.pad_id,
      f"{model.encoder} + {model.decoder}",
      model.label_smoothing,
      model.z_loss,
      model.caption_weight,
      mesh.shape["data"] * mesh.shape["fsdp"],
    )

  text_specs = None  # one caption, as the loader delivers it without being told
  batch_keys = ("image", "ids", "valid", "index")

  @property
  def image_size(self) -> int:
    return self.model.encoder.image_size

  @property
  def text_len(self) -> int:
    return cast(ov_models.DecoderConfig, self.model.decoder).max_len

  def text_processor(self, tokenizer: Tokenizer) -> None:
    """There is no text tower."""

  def init(self, key: jax.Array) -> Params:
    return ov_models.init(self.model, key)

  def abstract_params(self) -> Params:
    return ov_models.abstract_params(self.model)

  def logical_axes(self) -> Params:
    return ov_models.logical_axes(self.model)

  @functools.cached_property
  def flops_per_example(self) -> float:
    """Model FLOPs of forward and backward, without rematerialisation."""
    return ov_models.flops_per_example(self.model)

  def loss(self, params: Params, batch: dict[str, jax.Array], key: jax.Array) -> LossOutput:
    """Masked mean of the next-token loss; weight is the number of target tokens."""
    model = ov_models.bind(self.model, params)
    output = model(batch["image"], batch["ids"], key=key)
    targets, mask = ov_losses.shift_left(batch["ids"], self.pad_id)
    mask = mask * batch["valid"][:, None]
    result = ov_losses.caption_cross_entropy(
      cast(jax.Array, output.hidden),
      model.head_kernel,
      targets,
      mask,
      label_smoothing=self.label_smoothing,
      z_loss=self.z_loss,
      batch_shards=self.batch_shards,
    )
    metrics = {
      "caption_nll": result.nll,
      "token_accuracy": result.num_correct / jnp.maximum(result.num_tokens, 1),
    }
    return LossOutput(self.caption_weight * result.loss, result.num_tokens, metrics)

  def score(self, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood [B] and number of target tokens [B] of each caption."""
    model = ov_models.bind(self.model, params)
    output = model(batch["image"], batch["ids"])
    targets, mask = ov_losses.shift_left(batch["ids"], self.pad_id)
    mask = mask * batch["valid"][:, None]
    log_likelihood = ov_losses.sequence_log_likelihood(
      cast(jax.Array, output.hidden), model.head_kernel, targets, mask
    )
    return -log_likelihood, mask.sum(axis=1)
