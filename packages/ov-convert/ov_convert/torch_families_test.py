"""Tests of the PyTorch module and of ONNX graphs with the options of all families."""

import dataclasses

import numpy as np
import pytest

from ov_convert import onnx_export, timm_families, torch_module
from ov_convert.families import aimv2, clip, dino, siglip
from ov_convert.release import encoder_of
from ov_convert.testing.complete_models import (
  LENGTH,
  largest_difference,
  our_arrays,
  random_inputs,
  run,
  small_release,
)
from ov_models import (
  DecoderConfig,
  QueryDecoderConfig,
  TextConfig,
  VisionLanguageConfig,
  ViTConfig,
  vit_config,
)
from ov_models import config as block_config

BATCH = 2
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TOWER = SIZES | {"num_attention_heads": 2, "patch_size": 4, "image_size": 13}
TEXT = SIZES | {"num_attention_heads": 4, "vocab_size": 16, "max_position_embeddings": LENGTH}
PAIR = {"vision_config": TOWER, "text_config": TEXT | {"eos_token_id": 2}}
V2 = {name: value for name, value in TOWER.items() if name != "intermediate_size"}
SWIGLU = {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False}
TIMM = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "img_size": 12, "patch_size": 4}


def timm(name):
  tower = timm_families.of_architecture(name)
  return tower.family.read_config(TIMM | dict(tower.arguments), "")


FAMILIES = {
  "CLIP": clip.MODEL.read_config(PAIR | {"projection_dim": 10}, ""),
  "SigLIP": siglip.MODEL.read_config(PAIR, ""),
  "DINOv2": dino.V2[0].read_config(V2, ""),
  "DINOv2, SwiGLU": dino.V2[1].read_config(V2 | {"use_swiglu_ffn": True, "qkv_bias": False}, ""),
  "DINOv2, registers": dino.V2[2].read_config(V2 | {"num_register_tokens": 3}, ""),
  "DINOv3": dino.V3.read_config(TOWER | {"num_register_tokens": 2}, ""),
  "DINOv3, SwiGLU": dino.V3.read_config(TOWER | SWIGLU, ""),
  "PE-Core": timm("vit_pe_core_base_patch16_224"),
  "PE-Core, no cls": timm("vit_pe_core_gigantic_patch14_448"),
  "AIMv2": aimv2.MODEL.read_config(PAIR | {"projection_dim": 10}, ""),
  "AIMv2, mean": aimv2.TOWER.read_config(TOWER | {"use_head": False}, ""),
}
BASE = ViTConfig(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=13)
WORDS = TextConfig(width=16, depth=2, mlp_dim=24, num_heads=4, vocab_size=16, max_len=LENGTH)
WRITER = DecoderConfig(width=16, depth=2, mlp_dim=24, num_heads=2, vocab_size=16, max_len=9)
QUERIES = QueryDecoderConfig(
  width=16, depth=2, mlp_dim=24, num_heads=2, vocab_size=16, num_queries=5
)
BLOCKS = {
  "activation": "silu", "mlp": "gated", "norm": "rms", "norm_eps": 1e-3, "qkv_bias": "query_value",
  "out_bias": False, "mlp_bias": False, "qk_norm": True, "attention_gate": True, "layer_scale": 1.0,
}  # fmt: skip
replace = dataclasses.replace
# Options that no family has, or not in these combinations.
OTHERS = {
  "all options of the blocks": VisionLanguageConfig(
    encoder=replace(BASE, **BLOCKS, registers=1, rotary="mrope", pool="last"),
    text=replace(WORDS, **BLOCKS, pool="map"),
    decoder=replace(QUERIES, **BLOCKS),
    embed_dim=10,
  ),
  "QK norm with bias": replace(BASE, qk_norm=True, cls_token=False, registers=2),
  "captioner": VisionLanguageConfig(
    encoder=replace(BASE, activation="gelu_tanh", rotary="pe", pool="attend", pool_heads=4),
    decoder=replace(WRITER, **BLOCKS),
  ),
}
CASES = FAMILIES | OTHERS
# A graph takes longer to export than to run; these have every operation between them.
GRAPHS = (
  "CLIP", "SigLIP", "DINOv2", "DINOv2, registers", "DINOv3, SwiGLU", "PE-Core", "AIMv2",
  "all options of the blocks",
)  # fmt: skip
# float32 sums of at most 64 terms in another order; measured: 5.4e-7 of the largest entry.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def case(request, tmp_path_factory):
  """A release, its inputs, our outputs, and a folder."""
  release = small_release(CASES[request.param])
  inputs = random_inputs(release, BATCH)
  return release, inputs, our_arrays(release, inputs), tmp_path_factory.mktemp("families")


def check(ours, theirs, names):
  assert theirs.arrays.keys() == names
  for name in names:
    if name == "caption/ids":
      np.testing.assert_array_equal(theirs.arrays[name], ours[name])
    else:
      difference = largest_difference(ours[name], theirs.arrays[name])
      assert difference < TOLERANCE, (name, difference)


def test_the_pytorch_module_equals_ov_models(case):
  release, inputs, ours, folder = case
  torch_module.write(folder / "torch", release)
  theirs = run("run_torch.py", folder / "torch", inputs, folder)
  check(ours, theirs, ours.keys())
  epsilons = {v for k, v in theirs.facts.items() if k.startswith("image/") and k.endswith("eps")}
  assert epsilons == {encoder_of(release.config).norm_eps}


@pytest.mark.parametrize("case", GRAPHS, indirect=True)
def test_onnx_graphs_equal_ov_models(case):
  release, inputs, ours, folder = case
  onnx_export.write(folder / "onnx", release)
  theirs = run("run_onnx.py", folder / "onnx", inputs, folder)
  names = {"image/pooled", "image/tokens"}
  names |= {"image/embedding", "text/embedding", "logits"} if release.text is not None else set()
  check(ours, theirs, names)


def parts(config):
  if isinstance(config, VisionLanguageConfig):
    return [p for p in (config.encoder, config.text, config.decoder) if p is not None]
  return [config]


def test_the_cases_have_every_value_of_every_option():
  found = {
    (field.name, getattr(part, field.name))
    for config in CASES.values()
    for part in parts(config)
    for field in dataclasses.fields(part)
  }
  choices = block_config._BLOCK_CHOICES | vit_config._CHOICES
  choices |= dict.fromkeys(block_config._BLOCK_FLAGS, (True, False))
  training = ("drop_path_rule", "mask_mode", "position_resize")
  missing = [
    f"{name}={value!r}"
    for name, values in choices.items()
    for value in values
    if name not in training and (name, value) not in found
  ]
  assert missing == []
