"""Tests of the tables of families without their libraries: sizes, names, and refused fields."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from ov_convert import name_map, timm_families, transformers_families, transformers_vit
from ov_convert.families import aimv2, clip, dino, siglip
from ov_convert.families.timm_towers import TOWERS
from ov_convert.release import Preprocess, Release
import ov_models
from ov_models.testing import random_params


def sizes(width, depth, heads, mlp_dim=0, patch=14, side=224):
  return {
    "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
    "intermediate_size": mlp_dim or 4 * width, "patch_size": patch, "image_size": side,
  }  # fmt: skip


# Published sizes; parameters in millions: those of the papers or READMEs, else counted by hand from
# their configurations, without projections and mask tokens.
PUBLISHED = {
  "CLIP L/14": (clip.TOWER, sizes(1024, 24, 16), 303.2),
  "CLIP H/14": (clip.TOWER, sizes(1280, 32, 16), 630.8),
  "CLIP bigG/14": (clip.TOWER, sizes(1664, 48, 16, 8192), 1842.8),
  "SigLIP B/16": (siglip.TOWER, sizes(768, 12, 12, patch=16), 92.9),
  "SigLIP L/16, 256": (siglip.TOWER, sizes(1024, 24, 16, patch=16, side=256), 316.0),
  "SigLIP So400m/14, 384": (siglip.TOWER, sizes(1152, 27, 16, 4304, side=384), 428.2),
  "SigLIP 2 g-opt/16, 256": (
    siglip.TOWER, sizes(1536, 40, 16, patch=16, side=256), 1163.2
  ),
  "DINOv2 S/14": (dino.V2[0], sizes(384, 12, 6, side=518), 22.1),
  "DINOv2 L/14": (dino.V2[0], sizes(1024, 24, 16, side=518), 304.4),
  "DINOv2 g/14": (
    dino.V2[1], sizes(1536, 40, 24, side=518) | {"use_swiglu_ffn": True}, 1136.5
  ),
  "DINOv3 L/16": (
    dino.V3, sizes(1024, 24, 16, patch=16) | {"num_register_tokens": 4}, 303.1
  ),
  "DINOv3 7B/16": (
    dino.V3,
    sizes(4096, 40, 32, 8192, patch=16)
    | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}
    | {"query_bias": False, "value_bias": False},
    6716.0,
  ),
  "AIMv2 L": (aimv2.TOWER, sizes(1024, 24, 8, 2816) | {"use_head": False}, 309.2),
  "AIMv2 3B": (aimv2.TOWER, sizes(3072, 24, 24, 8192) | {"use_head": False}, 2720.7),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  family, content, millions = PUBLISHED[name]
  config = family.read_config(content, "")
  assert abs(ov_models.num_params(config) / 1e6 - millions) < 0.06 + 1e-4 * millions
  assert family.problems(config) == []
  names = family.name_map(config)
  names.check_complete(config)
  ours = [path for entry in names.entries for path in entry.ours]
  layers = {path: ours.count(path) for path in ours}
  blocks = {count for path, count in layers.items() if "blocks/" in path}
  assert blocks == {config.depth}
  again = family.read_config(family.write_config(config), "")
  assert again == config


def test_pe_core_of_published_sizes():
  """Towers of https://arxiv.org/abs/2504.13181, table 1: 0.09, 0.32 and 1.88 billion."""
  for name, sizes_, expected in (
    ("vit_pe_core_base_patch16_224", (768, 12, 3072, 16, 224), 0.09),
    ("vit_pe_core_large_patch14_336", (1024, 24, 4096, 14, 336), 0.32),
    ("vit_pe_core_gigantic_patch14_448", (1536, 50, 8960, 14, 448), 1.88),
  ):
    tower = timm_families.of_architecture(name)
    width, depth, mlp_dim, patch, side = sizes_
    content = {
      "embed_dim": width, "depth": depth, "mlp_dim": mlp_dim, "patch_size": patch,
      "img_size": side, "num_heads": tower.heads[width, depth],
    }  # fmt: skip
    config = tower.family.read_config(content, "")
    assert round(ov_models.num_params(config) / 1e9, 2) == expected
    tower.family.name_map(config).check_complete(config)
    assert tower.model_args(config)["mlp_ratio"] * width >= mlp_dim


def test_every_config_is_written_as_the_family_that_it_came_from():
  for family, content, _ in PUBLISHED.values():
    config = family.read_config(content, "")
    found = transformers_families.of_config(config)
    assert found is not None and found.model_type == family.model_type


REFUSED = {
  "clip_vision_model": {
    "hidden_act": ("relu", "hidden_act='relu' (supported: 'gelu' or 'quick_gelu'"),
    "num_channels": (4, "num_channels=4 (supported: 3)"),
    "hidden_size": ("768", "hidden_size='768'; expected an integer from 1 to"),
    "num_hidden_layers": (10**12, "num_hidden_layers=1000000000000; expected an integer"),
    "use_talking_heads": (True, "use_talking_heads=True (unknown)"),
    "image_size": ([224, 196], "image_size=[224, 196]; expected an integer"),
  },
  "siglip_vision_model": {"vision_use_head": (False, "vision_use_head=False (supported: True)")},
  "dinov2": {
    "apply_layernorm": (False, "apply_layernorm=False (supported: True)"),
    "hidden_act": ("relu", "hidden_act='relu' (supported: gelu or"),
  },
  "dinov3_vit": {
    "key_bias": (True, "query_bias=True, key_bias=True, value_bias=False (supported: all, none,"),
    "pos_embed_jitter": (1.5, "pos_embed_jitter=1.5 (supported: None)"),
    "num_register_tokens": (-1, "num_register_tokens=-1; expected an integer from 0"),
  },
  "aimv2_vision_model": {
    "is_native": (True, "is_native=True (supported: False)"),
    "rms_norm_eps": (float("1e9"), "rms_norm_eps=1000000000.0; expected a number"),
  },
}


@pytest.mark.parametrize(
  ("kind", "field"), [(kind, field) for kind, fields in REFUSED.items() for field in fields]
)
def test_refused_fields_are_named_in_one_line(kind, field, tmp_path):
  value, message = REFUSED[kind][field]
  content = {"model_type": kind} | sizes(32, 2, 4) | {field: value, "use_head": False}
  content |= {"value_bias": False} if field == "key_bias" else {}
  if kind != "aimv2_vision_model":
    del content["use_head"]
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    transformers_vit.read(tmp_path)
  assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_end_token_that_is_not_the_last_is_refused(tmp_path):
  text = {"vocab_size": 50, "eos_token_id": 7}
  content = {"model_type": "clip", "vision_config": {}, "text_config": text}
  (tmp_path / "config.json").write_text(json.dumps(content))
  message = r"text_config.eos_token_id=7 \(supported: the last of vocab_size=50\)"
  with pytest.raises(ValueError, match=message):
    transformers_vit.read(tmp_path)


def test_second_object_of_old_files_takes_precedence():
  text = {"text_config": {"hidden_size": 512}, "text_config_dict": {"hidden_size": 768}}
  config = clip.MODEL.read_config({"model_type": "clip", "vision_config": None, **text}, "")
  assert (config.encoder.width, config.text.width) == (768, 768)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"img_size": "224"}, "img_size='224'; expected an integer"),
    ({"ref_feat_shape": [9, 9]}, "ref_feat_shape=[9, 9] (supported: the grid 2 x 2 of img_size)"),
    ({"rope_type": "mixed"}, "rope_type='mixed' (unknown)"),
    ({"num_heads": None}, "num_heads=None; expected an integer"),
  ],
)
def test_arguments_of_timm_are_refused_by_name(changes, message):
  tower = timm_families.of_architecture("vit_pe_core_base_patch16_224")
  arguments = {
    "embed_dim": 32, "depth": 1, "mlp_dim": 48, "num_heads": 4, "img_size": 8, "patch_size": 4
  }  # fmt: skip
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    tower.family.read_config(arguments | changes, "config.json: ")
  assert "\n" not in str(caught.value)


def test_flat_and_prefixed_names_of_clip_are_read(tmp_path):
  config = clip.TOWER.read_config(sizes(32, 2, 4, patch=4, side=8), "")
  params = random_params(config)
  flat = clip.TOWER.name_map(config).to_theirs(params, config)
  assert all(name.startswith("vision_model.") for name in flat)
  content = clip.TOWER.write_config(config)
  for prefix in ("vision_model.", ""):
    folder = tmp_path / f"folder{prefix}"
    folder.mkdir()
    named = {prefix + name.removeprefix("vision_model."): t for name, t in flat.items()}
    safetensors.numpy.save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content))
    found = transformers_vit.read(folder)
    assert found.config == config
    for path, leaf in name_map.flatten(params).items():
      np.testing.assert_array_equal(name_map.flatten(found.params)[path], leaf)
  twice = flat | {"post_layernorm.bias": flat["vision_model.post_layernorm.bias"]}
  with pytest.raises(ValueError, match=r"contain vision_model.post_layernorm.bias twice"):
    clip.TOWER.canonical(twice)


def test_timm_folds_the_cls_position_of_towers_with_registers():
  tower = timm_families.of_architecture("vit_base_patch14_reg4_dinov2")
  args = {
    "embed_dim": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4, "img_size": 8, "patch_size": 4,
    "no_embed_class": True,
  }  # fmt: skip
  config = tower.family.read_config(args, "")
  params = random_params(config)
  flat, _ = timm_families.write(Release(config, params, Preprocess(8)), tower)
  assert flat["pos_embed"].shape == (1, 4, 32)
  content = {"architecture": tower.base, "model_args": args}
  again, back, _ = timm_families.read("config.json", content, flat, tower)
  assert again == config
  images = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
  ours, theirs = (ov_models.bind(config, p)(images).tokens for p in (params, back))
  # The sum of cls and its position is rounded in another order.
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_patterns_of_timm_are_tried_in_order():
  for name, family in (
    ("vit_base_patch16_clip_quickgelu_224.openai", "timm CLIP quick_gelu"),
    ("vit_large_patch14_clip_336.laion2b", "timm CLIP gelu"),
    ("vit_so400m_patch16_siglip_256.v2_webli", "timm SigLIP"),
    ("vit_giant_patch14_dinov2.lvd142m", "timm DINOv2 giant"),
    ("vit_small_plus_patch16_dinov3.lvd1689m", "timm DINOv3 plus without biases"),
    ("vit_base_patch16_dinov3_qkvb.lvd1689m", "timm DINOv3"),
    ("vit_pe_core_gigantic_patch14_448.fb", "timm PE-Core gigantic"),
    ("aimv2_3b_patch14_448.apple_pt", "timm AIMv2"),
  ):
    assert timm_families.of_architecture(name).family.name == family
  for name in ("vit_base_patch16_224.augreg", "resnet50", "vit_base_patch16_siglip_gap_224", None):
    assert timm_families.of_architecture(name) is None
  tanh = timm_families.of_architecture("vit_so400m_patch16_siglip_256")
  exact = timm_families.of_architecture("vit_base_patch16_siglip_256")
  assert tanh.family.sections[0].fields[-1].default == "gelu_tanh"
  assert exact.family.sections[0].fields[-1].default == "gelu"
  assert len({tower.family.name + tower.base for tower in TOWERS}) >= len(TOWERS) - 1
