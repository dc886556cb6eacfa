"""Tests that random models of other libraries, once imported, have the outputs of the library."""

import json

import chex
import numpy as np
import pytest
import safetensors.numpy

from ov_convert import open_clip, timm_vit, transformers_families, transformers_vit
from ov_convert.release import Preprocess, Release
from ov_convert.testing import foreign

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TOWER = SIZES | {"num_attention_heads": 4, "image_size": 12, "patch_size": 4}
TEXT = SIZES | {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
TEXT |= {"max_position_embeddings": 9}
V2 = {name: value for name, value in TOWER.items() if name != "intermediate_size"} | {
  "mlp_ratio": 2
}
OC_VISION = {"image_size": 12, "layers": 3, "width": 32, "head_width": 8, "patch_size": 4}
OC_TEXT = {"context_length": 9, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
ENDS = {"bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39}
SPECS = {
  "clip": {
    "library": "transformers", "kind": "CLIPModel", "depth": 3, "text_depth": 2,
    "fields": {"vision_config": TOWER, "text_config": TEXT | ENDS, "projection_dim": 24},
  },
  "clip, exact GELU": {
    "library": "transformers", "kind": "CLIPModel", "depth": 3, "text_depth": 2,
    "fields": {
      "vision_config": TOWER | {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
      "text_config": TEXT | ENDS | {"hidden_act": "gelu", "eos_token_id": 2},
      "projection_dim": 24,
    },
  },
  "clip tower": {
    "library": "transformers", "kind": "CLIPVisionModel", "depth": 3, "fields": TOWER,
  },
  "siglip": {
    "library": "transformers", "kind": "SiglipModel", "depth": 3, "text_depth": 2,
    "fields": {"vision_config": TOWER, "text_config": TEXT | {"projection_size": 32}},
  },
  "siglip tower": {
    "library": "transformers", "kind": "SiglipVisionModel", "depth": 3, "fields": TOWER,
  },
  "dinov2": {
    "library": "transformers", "kind": "Dinov2Model", "depth": 3, "fields": V2,
  },
  "dinov2, SwiGLU": {
    "library": "transformers", "kind": "Dinov2Model", "depth": 3,
    "fields": V2 | {"use_swiglu_ffn": True, "qkv_bias": False},
  },
  "dinov2, registers": {
    "library": "transformers", "kind": "Dinov2WithRegistersModel", "depth": 3,
    "fields": V2 | {"num_register_tokens": 3},
  },
  "dinov3": {
    "library": "transformers", "kind": "DINOv3ViTModel", "depth": 3,
    "fields": TOWER | {"num_register_tokens": 4},
  },
  "dinov3, SwiGLU": {
    "library": "transformers", "kind": "DINOv3ViTModel", "depth": 3,
    "fields": TOWER | {
      "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False
    },
  },
  "aimv2": {
    "library": "transformers", "kind": "Aimv2Model", "depth": 3, "text_depth": 2, "mask": True,
    "fields": {"vision_config": TOWER, "text_config": TEXT | ENDS, "projection_dim": 24},
  },
  "aimv2 tower": {
    "library": "transformers", "kind": "Aimv2VisionModel", "depth": 3,
    "fields": TOWER | {"use_head": False},
  },
  "open_clip": {
    "library": "open_clip", "kind": "CLIP", "depth": 3, "text_depth": 2,
    "fields": {"embed_dim": 24, "vision_cfg": OC_VISION, "text_cfg": OC_TEXT, "quick_gelu": True},
  },
  "open_clip, exact GELU": {
    "library": "open_clip", "kind": "CLIP", "depth": 3, "text_depth": 2,
    "fields": {
      "embed_dim": 24, "vision_cfg": OC_VISION | {"ls_init_value": 0.2, "pool_type": "avg"},
      "text_cfg": OC_TEXT,
    },
  },
}  # fmt: skip


def inputs(spec):
  rng = np.random.default_rng(0)
  side = spec.get("size", 12)
  arrays = {"pixels": rng.normal(size=(2, side, side, 3)).astype(np.float32)}
  if "text_depth" in spec:
    ids = rng.integers(3, 38, (3, 9))
    for row, end in zip(ids, (8, 4, 1)):
      row[end:] = 49407 if spec["library"] == "open_clip" else 39
    arrays["ids"] = ids
  return arrays


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The folder of all models, and the outputs of their libraries."""
  root = tmp_path_factory.mktemp("families")
  specs = [spec | {"name": name} for name, spec in SPECS.items()]
  return root, foreign.make(root, specs, {name: inputs(spec) for name, spec in SPECS.items()})


TIMM = {
  "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, "img_size": 12, "patch_size": 4
}  # fmt: skip
GRID = {"ref_feat_shape": [3, 3]}
SPECS |= {
  f"timm {name}": {"library": "timm", "kind": kind, "depth": 3, "fields": TIMM | fields}
  for name, kind, fields in (
    ("clip", "vit_base_patch16_clip_quickgelu_224", {}),
    ("siglip", "vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh"}),
    ("dinov2", "vit_base_patch14_dinov2", {}),
    ("dinov2, SwiGLU", "vit_giant_patch14_dinov2", {"mlp_ratio": 3.0}),
    ("dinov2, registers", "vit_base_patch14_reg4_dinov2", {}),
    ("dinov3", "vit_small_patch16_dinov3_qkvb", {"global_pool": "token"}),
    ("dinov3, SwiGLU", "vit_small_plus_patch16_dinov3", {}),
    ("PE-Core", "vit_pe_core_base_patch16_224", GRID),
    ("PE-Core, no cls", "vit_pe_core_gigantic_patch14_448", GRID),
    ("aimv2", "aimv2_large_patch14_224", {}),
  )
}


SPECS["open_clip PE-Core"] = {
  "library": "open_clip", "kind": "CustomTextCLIP", "depth": 12, "text_depth": 2, "size": 384,
  "fields": {
    "embed_dim": 24, "text_cfg": OC_TEXT, "vision_cfg": {
      "image_size": 384, "timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map",
      "timm_proj": None,
    },
  },
}  # fmt: skip


# What an import leaves out of models without tokenizer, or always.
NOTES = ("mask_token is not imported", "provide the tokenizer separately", "preprocessing: ")
MODULES = {"transformers": transformers_vit, "open_clip": open_clip, "timm": timm_vit}


def read(root, name):
  return MODULES[SPECS[name]["library"]].read(root / name)


@pytest.mark.parametrize("name", SPECS)
def test_imports_have_the_outputs_of_the_library(name, made):
  root, outputs = made
  found = read(root, name)
  assert [note for note in found.notes if not any(known in note for known in NOTES)] == []
  ours = foreign.outputs(found.config, found.params, inputs(SPECS[name]))
  differences = foreign.largest_differences(ours, outputs[name])
  assert {n.split("/")[0] for n in differences} >= {"image"}
  # float32 sums of up to 48 terms in three blocks.
  wrong = {n: d for n, d in differences.items() if not d < 5e-6}
  assert not wrong


@pytest.mark.parametrize("name", SPECS)
def test_round_trips_are_exact(name, made, tmp_path):
  root, _ = made
  found = read(root, name)
  release = Release(found.config, found.params, Preprocess(SPECS[name].get("size", 12)))
  module = MODULES[SPECS[name]["library"]]
  module.check(release)
  module.write(tmp_path / "out", release)
  (weights,) = (root / name).glob("*.safetensors")
  before, after = (
    safetensors.numpy.load_file(f / weights.name) for f in (root / name, tmp_path / "out")
  )
  if module is transformers_vit:
    content = json.loads((root / name / "config.json").read_text())
    family = transformers_families.of_content(content)
    before, after = family.canonical(before), family.canonical(after)
  if "embeddings.mask_token" in before:
    assert after["embeddings.mask_token"].shape == before["embeddings.mask_token"].shape
    before["embeddings.mask_token"] = after["embeddings.mask_token"]
  assert before.keys() == after.keys()
  chex.assert_trees_all_equal(after, before)
  again = module.read(tmp_path / "out")
  assert again.config == found.config
