"""Tests that models saved in format 1 (by the code of 2026-11-28) still load."""

import pathlib

import chex
import jax
import pytest

import ov_models
from ov_models.testing import random_params

FOLDERS = pathlib.Path(__file__).parent / "testdata" / "format1"
SIZES = {"width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2}
VIT = ov_models.ViTConfig(patch_size=4, image_size=8, **SIZES)
TEXT = ov_models.TextConfig(vocab_size=11, max_len=6, padding="attend", **SIZES)
QUERIES = ov_models.QueryDecoderConfig(vocab_size=11, num_queries=4, **SIZES)
CAUSAL = ov_models.DecoderConfig(vocab_size=11, max_len=5, mask="causal", position="none", **SIZES)
PARALLEL = ov_models.DecoderConfig(vocab_size=11, max_len=5, parallel=True, **SIZES)
CONFIGS = {
  "captioner": ov_models.VisionLanguageConfig(
    encoder=VIT, decoder=CAUSAL, keep_ratio=0.5, keep_order="random", eval_keep="fixed"
  ),
  "two_towers": ov_models.VisionLanguageConfig(
    encoder=VIT, text=TEXT, decoder=QUERIES, embed_dim=6, bias_init=-2.0
  ),
  "without_text": ov_models.VisionLanguageConfig(encoder=VIT, decoder=PARALLEL, parallel_ratio=0.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_format_1_loads(name):
  config, params = ov_models.load(FOLDERS / name)
  assert config == CONFIGS[name]
  chex.assert_trees_all_equal(params, random_params(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_is_saved_in_the_current_format(name, tmp_path):
  config, params = ov_models.load(FOLDERS / name)
  ov_models.save(tmp_path, config, params)
  assert ov_models.read_config(tmp_path)["format"] == 2
  assert ov_models.read_config(tmp_path)["model"]["kind"] == "VisionLanguage"
  again, values = ov_models.load(tmp_path)
  assert again == config
  chex.assert_trees_all_equal(values, params)
  assert jax.tree.structure(ov_models.init(config, jax.random.key(0))) == jax.tree.structure(params)
