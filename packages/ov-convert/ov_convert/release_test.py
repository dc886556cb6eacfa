"""Tests of the checks of releases and of their shared functions."""

import dataclasses

import numpy as np
import pytest

from ov_convert.release import (
  Preprocess,
  check_options,
  encoder_of,
  option_problems,
  portable,
  round_params,
)
import ov_models

VIT = ov_models.ViTConfig(
  width=8, depth=1, mlp_dim=12, num_heads=2, patch_size=4, image_size=8,
  dtype="bfloat16", remat="full", attention="cudnn",
)  # fmt: skip
TEXT = ov_models.TextConfig(width=8, depth=1, mlp_dim=12, num_heads=2, vocab_size=9, max_len=5)
TOWERS = ov_models.VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=None, embed_dim=8)


def test_the_encoder_of_every_kind_of_model():
  assert encoder_of(VIT) is VIT and encoder_of(TOWERS) is VIT
  with pytest.raises(ValueError, match="a text tower alone has no image tower"):
    encoder_of(TEXT)


def test_options_that_a_library_lacks_are_named():
  assert option_problems(TOWERS) == []
  vit = dataclasses.replace(VIT, registers=3, norm_eps=1e-5, pool="mean", layer_scale=0.1)
  text = dataclasses.replace(TEXT, activation="quick_gelu")
  pair = dataclasses.replace(TOWERS, encoder=vit, text=text)
  names = [
    "encoder.norm_eps=1e-05", "encoder.layer_scale=0.1", "encoder.registers=3",
    "text.activation='quick_gelu'", "encoder.pool='mean'",
  ]  # fmt: skip
  assert option_problems(pair) == names
  assert option_problems(pair, ["encoder.registers", "encoder.pool"]) == [
    name for name in names if "registers" not in name and "pool" not in name
  ]
  assert option_problems(dataclasses.replace(TEXT, qk_norm=True)) == ["text.qk_norm=True"]
  with pytest.raises(ValueError, match=r"timm does not support encoder.norm_eps=1e-05, .*library"):
    check_options(pair, "timm")


def test_portable_models_run_anywhere_and_are_the_same_otherwise():
  found = portable(TOWERS)
  assert (found.encoder.dtype, found.encoder.remat, found.encoder.attention) == (
    "float32", "none", "xla",
  )  # fmt: skip
  assert found.text == TEXT and found.embed_dim == 8
  assert (found.encoder.width, found.encoder.patch_size) == (8, 4)
  assert portable(found) == found


def test_rounding_is_that_of_the_file():
  tree = {"a": {"b": np.array([1.0, 1 + 2**-9, 1 + 2**-7], np.float32)}}
  rounded = round_params(tree, "bfloat16")["a"]["b"]
  assert rounded.dtype == np.float32
  np.testing.assert_array_equal(rounded, np.float32([1, 1, 1 + 2**-7]))  # 8 bits, ties to even
  np.testing.assert_array_equal(round_params(tree, "float32")["a"]["b"], tree["a"]["b"])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"fit": "crop"}, "fit='crop' is unknown; choose one of center, squash"),
    ({"mean": (0.5,)}, r"mean=\(0.5,\), .*expected three numbers each"),
    ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
    ({"std": (1.0, 1.0, float("nan"))}, "std above 0"),
  ],
)
def test_invalid_preprocessing(fields, message):
  with pytest.raises(ValueError, match=message):
    Preprocess(8, **fields)
