"""Tests of config validation and presets."""

import dataclasses

import pytest

from ov_models import DecoderConfig, VisionLanguageConfig, ViTConfig


def vit(**overrides):
  return ViTConfig.from_name("Ti/16", 64, **overrides)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: ViTConfig.from_name("Tl/16"), r"ViT variant='Tl' is unknown.*mu, Ti, S.*nearest: Ti"),
    (lambda: ViTConfig.from_name("L/big"), r"patch size 'big' in 'L/big' is not an integer"),
    (lambda: DecoderConfig.from_name("XL"), r"decoder variant='XL' is unknown.*nearest: L"),
    (lambda: vit(num_heads=5), r"width=192 is not a multiple of num_heads=5; nearest width: 190"),
    (lambda: vit(width=190, num_heads=5), r"width=190 cannot hold sine-cosine .*nearest: 192"),
    (lambda: vit(patch_size=65), r"image of 64 x 64 pixels is smaller than one patch of 65"),
    (lambda: vit(patch_size=0), r"patch_size=0 must be a positive integer"),
    (lambda: vit(depth=1.5), r"depth=1.5 must be a positive integer"),
    (lambda: vit(mask_ratio=1.0), r"mask_ratio=1.0 is out of range; give a fraction in \[0, 1\)"),
    (lambda: vit(pool="max"), r"pool='max' is unknown; choose one of gap, mean, tok, last, map"),
    (lambda: vit(position="sincos1d"), r"position='sincos1d' is unknown.*nearest: sincos2d"),
    (lambda: vit(mask_mode="block"), r"mask_mode='block' is unknown"),
    (lambda: vit(dtype="float16"), r"dtype='float16' is unknown; choose one of float32, bfloat16"),
    (lambda: vit(remat="minimal"), r"remat='minimal' is unknown; choose one of none, full, dots"),
    (lambda: vit(attention="flash"), r"attention='flash' is unknown; choose one of xla, cudnn"),
    (lambda: vit(attention="cudnn"), r"set dtype='bfloat16' or attention='xla'"),
    (lambda: DecoderConfig.from_name("Ti", vocab_size=0), r"vocab_size=0 must be a positive"),
    (lambda: DecoderConfig.from_name("Ti", mask="full"), r"mask='full' is unknown"),
    (
      lambda: VisionLanguageConfig.openvision2("Ti/16", "Ti", keep_ratio=0.0),
      r"keep_ratio=0.0 is out",
    ),
    (
      lambda: VisionLanguageConfig.openvision2("Ti/16", "Ti", keep_ratio=1.5),
      r"fraction in \(0, 1\]",
    ),
    (
      lambda: VisionLanguageConfig.openvision2("Ti/16", "Ti", preset="ov2"),
      r"preset='ov2' is unknown",
    ),
    (
      lambda: VisionLanguageConfig.openvision2("Ti/16", "Ti", eval_keep="some"),
      r"eval_keep='some'",
    ),
  ],
)
def test_invalid_configs(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_configs_are_hashable_and_frozen():
  assert hash(vit()) == hash(vit())
  assert vit() == vit()
  with pytest.raises(dataclasses.FrozenInstanceError):
    vit().width = 8


def test_patch_is_optional_and_any_field_can_be_set():
  config = ViTConfig.from_name("B", 224, depth=3)
  assert (config.patch_size, config.depth, config.width) == (16, 3, 768)
  assert ViTConfig.from_name("L/14", 384).grid == (27, 27)  # 6 pixels are dropped


def test_presets():
  ours = VisionLanguageConfig.openvision2("L/14", "L", dtype="bfloat16", remat="full")
  assert (ours.decoder.mask, ours.decoder.position, ours.keep_order) == (
    "prefix",
    "learned",
    "sorted",
  )
  assert ours.encoder.remat == ours.decoder.remat == "full"
  assert ours.encoder.dtype == ours.decoder.dtype == "bfloat16"
  released = VisionLanguageConfig.openvision2("L/14", "L", preset="openvision2_released")
  assert (released.decoder.mask, released.decoder.position, released.keep_order) == (
    "causal",
    "none",
    "random",
  )


@pytest.mark.parametrize(("size", "keep"), [(84, 12), (224, 89), (336, 201)])
def test_published_token_counts(size, keep):
  assert VisionLanguageConfig.openvision2("L/14", "L", image_size=size).num_kept == keep
