"""Tests that towers created by transformers, once imported, have the outputs of the library."""

import json
import os
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from ov_convert import client_env, reading, testing, transformers_forms, transformers_vit
import ov_models

# Made by the library, of random parameters of which none is 0 or 1; run by its Auto classes.
MAKE = """
import json, pathlib, sys
import numpy as np
import torch
import transformers as t
from safetensors.torch import save_file

root = pathlib.Path(sys.argv[1])
sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=12,
             patch_size=4, layer_norm_eps=1e-6)
mlp = dict(intermediate_size=24)
flat = dict(use_absolute_position_embeddings=True, use_relative_position_bias=False,
            drop_path_rate=0.0)
models = {
  "vit": t.ViTModel(t.ViTConfig(**sizes, **mlp)),
  "vit_no_bias": t.ViTModel(t.ViTConfig(**sizes, **mlp, qkv_bias=False), add_pooling_layer=False),
  "classes": t.ViTForImageClassification(t.ViTConfig(**sizes, **mlp, num_labels=3)),
  "beit": t.BeitModel(t.BeitConfig(**sizes, **mlp, **flat, layer_scale_init_value=0.1)),
  "beit_cls": t.BeitModel(
    t.BeitConfig(**sizes, **mlp, **flat, layer_scale_init_value=0.0, use_mean_pooling=False)
  ),
}
pixels = torch.from_numpy(np.load(root / "pixels.npy").transpose(0, 3, 1, 2).copy())
torch.manual_seed(0)
out = {}
for name, model in models.items():
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn_like(parameter), alpha=0.25)
    model.save_pretrained(root / name)
    # Once more under the names of the modules, as some versions have written them.
    (root / f"{name}_new").mkdir()
    t.AutoConfig.from_pretrained(root / name).save_pretrained(root / f"{name}_new")
    if name == "vit":
      torch.save(model.state_dict(), root / "vit_new" / "pytorch_model.bin")
    else:
      save_file(model.state_dict(), root / f"{name}_new" / "model.safetensors")
    tower = t.AutoModel.from_pretrained(root / name).eval()
    result = tower(pixels, output_hidden_states=True)
    for i, state in enumerate(result.hidden_states):
      out[f"{name}/{i}"] = state
    pooled = result.pooler_output
    if name in ("vit", "classes", "vit_no_bias"):  # their pooler is a dense layer of its own
      pooled = result.last_hidden_state[:, 0]
    out[f"{name}/pooled"] = pooled

# How multimodal models read a folder of ours.
ours = root / "ours"
towers = {a: t.AutoModel.from_pretrained(ours, attn_implementation=a) for a in ("eager", "sdpa")}
for attention, tower in towers.items():
  with torch.no_grad():
    out[f"{attention}/pooled"] = tower.eval()(pixels).pooler_output
text = t.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, vocab_size=20)
llava = t.LlavaForConditionalGeneration(t.LlavaConfig(
  vision_config=towers["sdpa"].config, text_config=text, image_token_index=19,
  vision_feature_layer=-2, vision_feature_select_strategy="default",
)).eval()
llava.model.vision_tower.load_state_dict(towers["sdpa"].state_dict())
llava.model.multi_modal_projector = torch.nn.Identity()
with torch.no_grad():
  found = llava.get_image_features(pixel_values=pixels)
out["llava"] = torch.stack(list(getattr(found, "pooler_output", found)))
np.savez(root / "out.npz", **{k: np.asarray(v) for k, v in out.items()})
"""
NAMES = ("vit", "vit_no_bias", "classes", "beit", "beit_cls")
NOTES = {
  "vit": ["patches is added", "pooler.dense is not imported"],
  "vit_no_bias": ["patches is added", "no bias in query, key, value", "tanh of the pooler"],
  "classes": [
    "patches is added",
    "tanh of the pooler",
    "classifier.bias, classifier.weight not imported",
  ],
  "beit": ["4 layer scales", "patches is added"],
  "beit_cls": ["patches is added", "no bias in key"],
}
OURS = ov_models.ViTConfig(
  width=16, depth=3, mlp_dim=24, num_heads=2, patch_size=4, image_size=12
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The folder of all models, the pixels, and the outputs of the library."""
  root = tmp_path_factory.mktemp("transformers")
  pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
  np.save(root / "pixels.npy", pixels)
  transformers_vit.write(root / "ours", testing.release(OURS))
  command = [client_env.find_python(), "-c", MAKE, root]
  # As in client_env: Bazel sets PYTHON* for our interpreter, not for that of the clients.
  kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  env = kept | {"HF_HUB_OFFLINE": "1"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert not done.returncode, done.stderr[-2000:]
  return root, pixels, np.load(root / "out.npz")


@pytest.mark.parametrize("form", ["", "_new"])
@pytest.mark.parametrize("name", NAMES)
def test_imported_models_equal_the_library(name, form, made):
  root, pixels, expected = made
  found = transformers_vit.read(root / (name + form))
  assert found.config.position == "learned"
  assert found.config.pool == ("gap" if name == "beit" else "tok")
  model = ov_models.bind(found.config, found.params)
  states = model.hidden_states(pixels)
  # 1e-5 of the largest entry: float32 sums of up to 48 products, in another order.
  for i in range(3):
    theirs = expected[f"{name}/{i}"]
    np.testing.assert_allclose(states[i], theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  theirs = expected[f"{name}/pooled"]
  pooled = model(pixels).pooled
  np.testing.assert_allclose(pooled, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  assert len(found.notes) == len(NOTES[name]), found.notes
  for note in NOTES[name]:
    assert any(note in told for told in found.notes), note


def test_multimodal_models_read_our_exports(made):
  root, pixels, found = made
  imported = transformers_vit.read(root / "ours")
  model = ov_models.bind(imported.config, imported.params)
  pooled = model(pixels).pooled
  for attention in ("eager", "sdpa"):
    np.testing.assert_allclose(found[f"{attention}/pooled"], pooled, rtol=0, atol=1e-5)
  penultimate = np.asarray(model.hidden_states(pixels)[-2][:, 1:])
  assert found["llava"].shape == penultimate.shape == (2, 9, 16)
  np.testing.assert_allclose(
    found["llava"], penultimate, rtol=0, atol=1e-5 * np.abs(penultimate).max()
  )


def config_of(kind, **fields):
  return {"model_type": kind, "layer_norm_eps": 1e-6} | fields


@pytest.mark.parametrize(
  ("content", "named"),
  [
    (
      config_of("vit", layer_norm_eps=1e-12, hidden_act="gelu_new", num_channels=1),
      ["layer_norm_eps=1e-12 (expected 1e-06)", "hidden_act='gelu_new' (expected 'gelu')",
       "num_channels=1 (expected 3)"],
    ),
    ({"model_type": "vit"}, ["layer_norm_eps=1e-12 (expected 1e-06)"]),  # their default
    (
      config_of("beit", use_relative_position_bias=True),
      ["use_absolute_position_embeddings=False (expected True)",
       "use_relative_position_bias=True (expected False)"],
    ),
    (config_of("vit", image_size=[16, 32]), ["image_size=[16, 32] (expected one integer"]),
    (config_of("vit", hidden_size="768"), ["hidden_size='768' (expected an integer from"]),
    (
      {"model_type": "siglip2", "vision_config": {}},
      ["any aspect ratio", "hidden_act='gelu_pytorch_tanh' (expected 'gelu')"],
    ),
    ({"model_type": "bert", "hidden_act": "relu"}, ["model_type='bert' (supported: vit, beit,",
     "hidden_act='relu'"]),
    ({}, ["model_type=None"]),
  ],
)  # fmt: skip
def test_other_architectures_are_refused_by_field(content, named, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="is not a supported tower") as caught:
    transformers_vit.read(tmp_path)
  for part in named:
    assert part in str(caught.value)


def test_two_names_for_one_tensor_are_refused(made, tmp_path):
  root, _, _ = made
  flat = reading.read_tensors(root / "vit", ["model.safetensors"])
  flat["layers.0.mlp.fc1.bias"] = flat["encoder.layer.0.intermediate.dense.bias"]
  (tmp_path / "config.json").write_text((root / "vit/config.json").read_text())
  safetensors.numpy.save_file(flat, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"encoder.layer.0.intermediate.dense.bias twice"):
    transformers_vit.read(tmp_path)


@pytest.mark.parametrize(
  ("content", "expected", "noted"),
  [
    ({"size": {"height": 8, "width": 8}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0] * 3},
     ("squash", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)), []),
    ({"size": 8}, ("squash", (0.5,) * 3, (0.5,) * 3), []),
    ({"size": {"shortest_edge": 8}, "do_center_crop": True, "resample": 1},
     ("center", (0.5,) * 3, (0.5,) * 3), ["resample=1"]),
    ({"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8},
      "do_center_crop": True, "do_normalize": False},
     ("center", (0.0,) * 3, (1.0,) * 3), ["shorter side of 8, not 10"]),
    ({"size": 10, "crop_size": 8, "do_center_crop": True},
     ("center", (0.5,) * 3, (0.5,) * 3), ["shorter side of 8, not 10"]),
    ({"size": 8, "rescale_factor": 0.5}, ("squash", (0.5,) * 3, (0.5,) * 3), ["not 0.5"]),
    ({"size": {"height": 6, "width": 6}}, ("squash", (0.5,) * 3, (0.5,) * 3), ["8 pixels", "6"]),
  ],
)  # fmt: skip
def test_preprocessing_is_read(content, expected, noted):
  found, notes = transformers_forms.preprocess_from(content, 8)
  assert (found.image_size, found.fit, found.mean, found.std) == (8, *expected)
  assert bool(notes) == bool(noted)
  assert all(part in notes[0] for part in noted)


def test_the_filter_is_kept():
  for number, name in ((2, "bilinear"), (3, "bicubic")):
    found, notes = transformers_forms.preprocess_from({"size": 8, "resample": number}, 8)
    assert found.interpolation == name and notes == []
    assert transformers_forms.preprocessor(found)["resample"] == number


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"image_mean": 0.5}, "image_mean=0.5; expected three numbers"),
    ({"image_std": [1.0, 0.0, 1.0]}, "std above 0"),
    ({"size": {"height": "8"}}, "a size of {'height': '8'}"),
  ],
)
def test_invalid_preprocessing_is_rejected(content, message):
  with pytest.raises(ValueError, match=message):
    transformers_forms.preprocess_from(content, 8)
