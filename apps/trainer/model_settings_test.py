"""Tests that settings describe the models of imports, field by field."""

import dataclasses

import pytest

from apps.trainer.config import model_config, model_settings
import ov_models
from ov_models import VisionLanguageConfig, ViTConfig

SIZES = {"width": 32, "depth": 3, "mlp_dim": 48, "num_heads": 4}
CLIP = VisionLanguageConfig.from_names(
  "B/16", "B", image_size=224, preset="clip", text_len=77, vocab_size=49408,
  encoder_options={
    "position": "learned", "position_resize": "bicubic", "pool": "tok", "pre_norm": True,
    "norm_eps": 1e-5, "activation": "quick_gelu",
  },
  text_options={"activation": "quick_gelu", "norm_eps": 1e-5},
  log_scale_init=4.6052,
)  # fmt: skip
SIGLIP = VisionLanguageConfig(
  encoder=ViTConfig(
    **SIZES, patch_size=14, image_size=384, cls_token=False, patch_bias=True, pool="map",
    position="learned", position_resize="bicubic",
  ),
  text=ov_models.TextConfig(
    **SIZES, vocab_size=256_000, max_len=64, pool="last", padding="attend", pad_id=1
  ),
  image_head=False, text_head_bias=True, bias_init=-16.5, log_scale_init=4.7,
)  # fmt: skip
DINOV3 = ViTConfig(
  **SIZES, patch_size=16, image_size=256, position="none", rotary="dinov3", rotary_rescale=2.0,
  registers=4, pool="tok", patch_bias=True, qkv_bias="query_value", layer_scale=1e-5, norm_eps=1e-5,
  mlp="gated", activation="silu", drop_path=0.1,
)  # fmt: skip
CAPTIONER = VisionLanguageConfig.openvision2("L/14", "L", preset="openvision2_released")
OPENVISION = VisionLanguageConfig.from_names(
  "S/8", "S", "S", image_size=160, preset="openvision_released"
)


@pytest.mark.parametrize(
  "config", [CLIP, SIGLIP, CAPTIONER, OPENVISION], ids=["clip", "siglip", "captioner", "openvision"]
)
def test_settings_give_the_model_back(config):
  settings = model_settings(config)
  rows = (config.text or config.decoder).vocab_size
  found = model_config(settings, vocab_size=rows)
  assert found.log_scale_init == pytest.approx(config.log_scale_init, rel=1e-12)
  assert dataclasses.replace(found, log_scale_init=config.log_scale_init) == config


def test_only_differences_from_the_variant_are_options():
  settings = model_settings(CLIP)
  assert settings.encoder == "B/16"
  assert set(settings.encoder_options) == {
    "position", "position_resize", "pool", "pre_norm", "norm_eps", "activation"
  }  # fmt: skip
  assert "width" not in settings.text_options


def test_an_image_tower_needs_a_text_tower():
  settings = model_settings(DINOV3)
  assert (settings.text, settings.decoder) == ("", "")
  settings = dataclasses.replace(settings, text="Ti")
  assert model_config(settings, vocab_size=100).encoder == DINOV3


def test_compute_options_are_those_of_the_run():
  encoder = dataclasses.replace(CLIP.encoder, dtype="bfloat16", remat="full")
  settings = model_settings(dataclasses.replace(CLIP, encoder=encoder))
  assert settings.dtype == "float32" and "remat" not in settings.encoder_options


def test_a_model_without_settings_is_refused():
  with pytest.raises(ValueError, match="fields that no setting of config.model describes"):
    model_settings(dataclasses.replace(CAPTIONER, eval_keep="fixed"))
