"""Tests of loading workdirs for export, and of errors in them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from apps.exporter.importer import write_workdir
from apps.exporter.source import load_source
from ov_convert.release import Imported, Preprocess, TokenizerSpec
import ov_data
import ov_models

_BLOCK = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2}
VIT = ov_models.ViTConfig(**_BLOCK, patch_size=8, image_size=32)
CLIP = ov_models.VisionLanguageConfig.from_names(
  "Ti/8", "Ti", "Ti", image_size=32, vocab_size=64, text_len=8, caption_len=6, embed_dim=16,
  encoder_options=_BLOCK, text_options=_BLOCK, decoder_options=_BLOCK,
)  # fmt: skip
CAPTIONER = ov_models.VisionLanguageConfig.openvision2(
  "Ti/8", "Ti", image_size=32, vocab_size=64, max_len=6,
  encoder_options=_BLOCK | {"position": "learned"}, decoder_options=_BLOCK,
)  # fmt: skip


def make(workdir, config, fit="squash"):
  tokenizer = ov_data.Tokenizer.train(["a red square", "a blue dot"], 60, kind="words")
  text = getattr(config, "text", None)
  words = TokenizerSpec(
    tokenizer.to_json(), text.max_len if text else 6, text is not None, tokenizer.pad_id,
    tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.cls_id,
  )  # fmt: skip
  params = jax.tree.map(np.asarray, ov_models.init(config, jax.random.key(0)))
  preprocess = Preprocess(32, fit, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
  write_workdir(workdir, Imported(config, params, preprocess, words), "somewhere", workdir.parent)
  return params


@pytest.mark.parametrize("config", [CLIP, CAPTIONER, VIT], ids=["clip", "captioner", "vit"])
def test_models_come_back(tmp_path, config):
  params = make(tmp_path / "w", config)
  source = load_source(tmp_path / "w")
  assert source.release.config == config
  jax.tree.map(np.testing.assert_array_equal, source.release.params, params)
  assert source.release.preprocess == Preprocess(32, "squash", (0.5,) * 3, (0.25,) * 3)
  assert source.about["imported"]["from"] == "somewhere" and source.about["step"] == 0
  words = source.release.words
  if config is CLIP:
    assert (words.length, words.append_cls) == (8, True)
    assert source.processor.encode(["a red square"])[0, -1] == words.cls_id
  elif config is CAPTIONER:
    assert (words.length, words.append_cls) == (6, False) and source.processor is None
    assert source.specials == (words.bos_id, words.eos_id, words.pad_id)
  else:
    assert words is None and source.specials is None


def test_another_resolution(tmp_path):
  params = make(tmp_path / "c", CAPTIONER)
  release = load_source(tmp_path / "c", image_size=48).release
  assert release.encoder.image_size == release.preprocess.image_size == 48
  table = release.params["encoder"]["position_embedding"]
  assert table.shape == (1 + 6 * 6, 32)
  before = params["encoder"]["position_embedding"]
  np.testing.assert_array_equal(table[0], before[0])  # of the cls token
  np.testing.assert_array_equal(table, ov_models.resample_positions(before, (4, 4), (6, 6)))
  params = make(tmp_path / "v", VIT)
  release = load_source(tmp_path / "v", image_size=64).release  # computed: nothing changes
  assert release.config == dataclasses.replace(VIT, image_size=64)
  jax.tree.map(np.testing.assert_array_equal, release.params, params)
  with pytest.raises(ValueError, match="smaller than one patch"):
    load_source(tmp_path / "v", image_size=7)


def test_16_bit_parameters_are_rounded(tmp_path):
  params = make(tmp_path / "w", VIT)
  rounded = load_source(tmp_path / "w", dtype="bfloat16").release
  kernel = params["patch_embed"]["kernel"]
  got = rounded.params["patch_embed"]["kernel"]
  assert got.dtype == np.float32 and 0 < np.abs(got - kernel).max() < np.abs(kernel).max() / 128


def test_invalid_workdirs(tmp_path):
  with pytest.raises(ValueError, match="no such folder"):
    load_source(tmp_path / "nowhere")
  with pytest.raises(OSError, match="no intact checkpoint"):
    load_source(tmp_path)
  make(tmp_path / "w", VIT)
  with pytest.raises(OSError, match="no checkpoint of step 7"):
    load_source(tmp_path / "w", step=7)
  with pytest.raises(OSError, match="ema"):
    load_source(tmp_path / "w", part="ema")


def test_a_tokenizer_of_another_run(tmp_path):
  make(tmp_path / "w", CLIP)
  other = ov_data.Tokenizer.train(["entirely other words"], 60, kind="words")
  ov_data.TextProcessor(other, 8).save(tmp_path / "w" / "tokenizer")
  with pytest.raises(ValueError, match="is not the tokenizer of"):
    load_source(tmp_path / "w")


def test_an_earlier_checkpoint_has_the_texts_of_its_stage(tmp_path):
  make(tmp_path / "w", CLIP)
  tokenizer = load_source(tmp_path / "w").tokenizer
  ov_data.TextProcessor(tokenizer, 12).save(tmp_path / "w" / "tokenizer")  # a later stage began
  source = load_source(tmp_path / "w")
  assert source.release.words.length == source.processor.length == CLIP.text.max_len == 8


def test_a_single_text_tower_is_rejected(tmp_path):
  text = ov_models.TextConfig(**_BLOCK, vocab_size=64, max_len=8)
  make(tmp_path / "w", text)
  with pytest.raises(ValueError, match="contains only a text tower"):
    load_source(tmp_path / "w")


def test_figures_are_those_of_the_step(tmp_path):
  make(tmp_path / "w", VIT)
  assert load_source(tmp_path / "w").results == ()
  content = {"split": "heldout", "examples_seen": 5, "results": [{"name": "knn", "value": 0.5}]}
  (tmp_path / "w" / "evaluations").mkdir()
  (tmp_path / "w" / "evaluations" / "0.json").write_text(json.dumps(content))
  (row,) = load_source(tmp_path / "w").results
  assert (row["name"], row["split"], row["examples_seen"]) == ("knn", "heldout", 5)


@pytest.mark.parametrize(
  "content", ["[]", "{", "[" * 100_000, "3", '{"split": 3, "results": []}', "\\xff",
              '{"split": "x", "results": {}}', '{"split": "x", "results": [3]}',
              '{"split": "x", "results": [{"name": "knn", "value": [1]}]}'],
)  # fmt: skip
def test_evaluations_of_another_form_are_one_line(tmp_path, content):
  make(tmp_path / "w", VIT)
  (tmp_path / "w" / "evaluations").mkdir()
  (tmp_path / "w" / "evaluations" / "0.json").write_text(content, "latin-1")
  with pytest.raises(ValueError, match=r"0\.json is damaged: .*; restore it") as told:
    load_source(tmp_path / "w")
  assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", ["[]", '{"checkpoint": []}', '{"checkpoint": {"dir": 3}}', "{"])
def test_a_config_of_another_form_is_one_line(tmp_path, content):
  make(tmp_path / "w", VIT)
  (tmp_path / "w" / "config.json").write_text(content)
  with pytest.raises(ValueError, match=r"config\.json is damaged: "):
    load_source(tmp_path / "w")
