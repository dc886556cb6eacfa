"""OpenVision models: vision encoders, text encoders and caption decoders."""

from ov_models.decoder import DECODER_VARIANTS, Decoder, DecoderConfig
from ov_models.files import config_from_dict, config_to_dict, load, read_config, save
from ov_models.functional import (
  abstract_params,
  bind,
  flops_per_example,
  init,
  logical_axes,
  num_params,
)
from ov_models.generate import GenerateOutput, generate
from ov_models.lora import ADAPTERS, LoraConfig, adapter_axes, add_adapters, merge_adapters
from ov_models.model import Embedded, VisionLanguageModel, VisionLanguageOutput
from ov_models.model_config import VisionLanguageConfig
from ov_models.partition import RULES
from ov_models.positions import resample_positions, sincos2d
from ov_models.presets import EMBED_DIMS, PRESETS, Preset
from ov_models.query_decoder import QueryDecoder, QueryDecoderConfig
from ov_models.text import TEXT_VARIANTS, TextConfig, TextEncoder, TextOutput
from ov_models.vit import ViT, ViTOutput
from ov_models.vit_config import VIT_VARIANTS, ViTConfig

__all__ = [
  "ADAPTERS",
  "DECODER_VARIANTS",
  "EMBED_DIMS",
  "PRESETS",
  "RULES",
  "TEXT_VARIANTS",
  "VIT_VARIANTS",
  "Decoder",
  "DecoderConfig",
  "Embedded",
  "LoraConfig",
  "GenerateOutput",
  "Preset",
  "QueryDecoder",
  "QueryDecoderConfig",
  "TextConfig",
  "TextEncoder",
  "TextOutput",
  "ViT",
  "ViTConfig",
  "ViTOutput",
  "VisionLanguageConfig",
  "VisionLanguageModel",
  "VisionLanguageOutput",
  "abstract_params",
  "adapter_axes",
  "add_adapters",
  "bind",
  "config_from_dict",
  "config_to_dict",
  "flops_per_example",
  "generate",
  "init",
  "load",
  "logical_axes",
  "merge_adapters",
  "num_params",
  "read_config",
  "resample_positions",
  "save",
  "sincos2d",
]
