"""Tests of text towers: names, fields, errors. Outputs are tested in transformers_vit_test."""

import dataclasses
import json

import chex
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import testing, transformers_text
from ov_models import TextConfig, VisionLanguageConfig, ViTConfig

VIT = ViTConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4, image_size=8)
TEXT = TextConfig(width=12, depth=2, mlp_dim=20, num_heads=3, vocab_size=20, max_len=testing.LENGTH)
TOWERS = VisionLanguageConfig(encoder=VIT, text=TEXT, decoder=None, embed_dim=10)
CLIP = dataclasses.replace(
  TOWERS, text=dataclasses.replace(TEXT, mask="causal", pool="argmax", padding="attend")
)


def load(folder):
  content = json.loads((folder / "config.json").read_text("utf-8"))
  return content, safetensors.numpy.load_file(folder / "model.safetensors")


def test_bidirectional_tower(tmp_path):
  model = testing.release(TOWERS)
  transformers_text.write(tmp_path, model)
  content, flat = load(tmp_path)
  assert content["architectures"] == ["SiglipTextModel"]
  assert (content["projection_size"], content["max_position_embeddings"]) == (10, testing.LENGTH)
  assert (content["hidden_act"], content["layer_norm_eps"]) == ("gelu_pytorch_tanh", 1e-6)
  assert (content["pad_token_id"], content["eos_token_id"]) == (0, model.words.eos_id)
  assert content["openvision"] == {"padding": "mask", "append_cls": True}
  text = model.params["text"]
  np.testing.assert_array_equal(
    flat["text_model.encoder.layers.1.self_attn.k_proj.weight"],
    text["blocks"]["attn"]["key"]["kernel"][1].T,
  )
  np.testing.assert_array_equal(
    flat["text_model.embeddings.position_embedding.weight"], text["position_embedding"]
  )
  head = model.params["text_head"]["kernel"]
  np.testing.assert_array_equal(flat["text_model.head.weight"], head.T)
  assert not flat["text_model.head.bias"].any()
  assert len(flat) == 16 * 2 + 4 + 2
  assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["post_processor"]


def test_causal_tower(tmp_path):
  model = testing.release(CLIP, words=testing.words(append_cls=False))
  transformers_text.write(tmp_path, model)
  content, flat = load(tmp_path)
  assert content["architectures"] == ["CLIPTextModelWithProjection"]
  assert content["projection_dim"] == 10
  # Their sign for pooling at the largest id; another number would be searched for in the text.
  assert content["eos_token_id"] == 2 != model.words.eos_id
  np.testing.assert_array_equal(
    flat["text_projection.weight"], model.params["text_head"]["kernel"].T
  )
  assert len(flat) == 16 * 2 + 4 + 1


@pytest.mark.parametrize("config", [TOWERS, CLIP], ids=["full", "causal"])
def test_names_without_prefix_are_read_too(config, tmp_path):
  model = testing.release(config, words=testing.words(append_cls=config is TOWERS))
  transformers_text.write(tmp_path, model)
  _, flat = load(tmp_path)
  bare = {name.removeprefix("text_model."): tensor for name, tensor in flat.items()}
  safetensors.numpy.save_file(bare, tmp_path / "model.safetensors")
  found = transformers_text.read(tmp_path)
  assert (found.config, found.embed_dim) == (config.text, 10)
  assert (found.words.length, found.words.append_cls) == (testing.LENGTH, config is TOWERS)
  params = transformers_text.name_map(config).to_ours(found.flat, config)
  expected = {name: model.params[name] for name in ("text", "text_head")}
  chex.assert_trees_all_equal(params, expected)


@pytest.mark.parametrize("pool", ["first", "mean", "map", "argmax"])
def test_other_poolings_are_refused(pool, tmp_path):
  model = testing.release(dataclasses.replace(TOWERS, text=dataclasses.replace(TEXT, pool=pool)))
  with pytest.raises(ValueError, match=f"text.mask='full' with text.pool='{pool}'"):
    transformers_text.write(tmp_path / "x", model)
  assert not (tmp_path / "x").exists()


def test_a_model_without_text_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no text tower"):
    transformers_text.write(tmp_path / "x", testing.release(VIT))


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    (
      {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
      [
        "hidden_act='quick_gelu' (expected 'gelu_pytorch_tanh')",
        "layer_norm_eps=1e-05 (expected 1e-06)",
      ],
    ),
    ({"model_type": "bert"}, ["model_type='bert'"]),
    ({"model_type": "clip_text_model", "eos_token_id": 49407}, ["eos_token_id=49407"]),
    ({"openvision": None}, ["openvision=None"]),
    ({"openvision": {"padding": "seen", "append_cls": True}}, ["padding='seen'"]),
  ],
)
def test_other_towers_are_refused_by_field(changes, named, tmp_path):
  transformers_text.write(tmp_path, testing.release(TOWERS))
  content, _ = load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(content | changes))
  with pytest.raises(ValueError) as caught:
    transformers_text.read(tmp_path)
  assert all(part in str(caught.value) for part in named)


def test_published_sizes():
  for size, depth in (("Ti", 12), ("So400m", 27)):
    config = VisionLanguageConfig.from_names(f"{size}/14", size, None)
    found = transformers_text.name_map(config)
    found.check_complete(config)
    assert len(found.entries) + len(found.fixed) == 16 * depth + 6
