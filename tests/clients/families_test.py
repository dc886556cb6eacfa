"""Tests that models of other families are imported, and exported back, by //apps:export's code."""

import json
import os
import subprocess

import numpy as np
import pytest

from apps.exporter import exporting, importer
from apps.exporter.source import load_source
from apps.trainer.progress import Terminal
from ov_convert import client_env, hf_tokenizer
from ov_convert.testing import foreign
import ov_data
import ov_models

TOWER = {
  "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
  "image_size": 24, "patch_size": 8,
}  # fmt: skip
TEXT = {
  "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
  "vocab_size": 40, "max_position_embeddings": 9,
}  # fmt: skip
SPECS = {
  "clip": {
    "kind": "CLIPModel", "text_depth": 2,
    "fields": {
      "vision_config": TOWER, "text_config": TEXT | {"eos_token_id": 39}, "projection_dim": 24
    },
  },
  "siglip": {
    "kind": "SiglipModel", "text_depth": 2,
    "fields": {"vision_config": TOWER, "text_config": TEXT | {"projection_size": 32}},
  },
  "dinov2": {
    "kind": "Dinov2WithRegistersModel",
    "fields": {n: v for n, v in TOWER.items() if n != "intermediate_size"} | {"mlp_ratio": 2},
  },
  "dinov3": {"kind": "DINOv3ViTModel", "fields": TOWER | {"num_register_tokens": 2}},
  "aimv2": {"kind": "Aimv2VisionModel", "fields": TOWER | {"use_head": False}},
}  # fmt: skip
# The vocabulary of CLIP, as open_clip contains it, in the tokenizer class of transformers.
TOKENIZER = """
import json, sys
import transformers
from open_clip.tokenizer import SimpleTokenizer

plain = SimpleTokenizer()
names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
vocab = {names.get(token, token): i for token, i in plain.encoder.items()}
merges = sorted(plain.bpe_ranks, key=plain.bpe_ranks.get)
tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
tokenizer.save_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
ids = tokenizer(texts, padding="max_length", truncation=True, max_length=20).input_ids
own = plain(texts, context_length=20).tolist()
print(json.dumps([ids, own]))
"""
PREPROCESSOR = {
  "image_processor_type": "CLIPImageProcessor", "size": {"height": 24, "width": 24},
  "do_center_crop": False, "resample": 3,
  "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.2],
}  # fmt: skip
CARD = """---
license: other
license_name: tower-licence
---
# A Tower

```bibtex
@article{tower, url={https://example.org/a/b}}
```
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The folder of all models, made by transformers."""
  root = tmp_path_factory.mktemp("families")
  rng = np.random.default_rng(0)
  specs = [
    {"name": name, "library": "transformers", "depth": 2, **spec} for name, spec in SPECS.items()
  ]
  inputs = {}
  for spec in specs:
    inputs[spec["name"]] = {"pixels": rng.normal(size=(1, 24, 24, 3)).astype(np.float32)}
    if "text_depth" in spec:
      inputs[spec["name"]]["ids"] = rng.integers(0, 39, (1, 9))
      inputs[spec["name"]]["ids"][:, 5:] = 39
  foreign.make(root, specs, inputs)
  for name in SPECS:
    (root / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (root / name / "README.md").write_text(CARD)
  return root


@pytest.mark.parametrize("name", SPECS)
def test_export_back_to_the_library(name, made, tmp_path):
  importer.import_model(f"transformers:{made / name}", tmp_path / "workdir")
  source = load_source(tmp_path / "workdir")
  assert source.license(None) == "tower-licence"
  out = tmp_path / "out"
  formats = ["transformers", "timm", "safetensors", "onnx"]
  assert exporting.export(source, formats, out, None, source.license(None), Terminal())
  facts = json.loads((out / "transformers/parity.json").read_text())
  rows = {row["name"]: row for row in facts["rows"]}
  assert {"image/pixels", "image/block_02", "image/tokens", "image/pooled"} <= rows.keys()
  assert ("text/embedding" in rows) == ("text_depth" in SPECS[name])
  assert all(row["ok"] for row in rows.values())
  for other in ("safetensors", "onnx"):
    found = json.loads((out / other / "parity.json").read_text())["rows"]
    assert {"image/tokens", "image/pooled"} <= {row["name"] for row in found if row["ok"]}
  page = (out / "transformers/README.md").read_text()
  assert "tower-licence" in page and "# A Tower, 24 px" in page
  assert "@article{tower, url={https://example.org/a/b}}" in page
  config = json.loads((made / name / "config.json").read_text())
  again = json.loads((out / "transformers/config.json").read_text())
  assert again["model_type"] == config["model_type"]
  assert json.loads((out / "transformers/preprocessor_config.json").read_text())["resample"] == 3


def test_other_formats_refuse_options_by_name(made, tmp_path):
  importer.import_model(f"transformers:{made / 'dinov3'}", tmp_path / "workdir")
  source = load_source(tmp_path / "workdir")
  with pytest.raises(ValueError, match="(?s)open_clip: .*encoder.rotary='dinov3'"):
    exporting.export(source, ["open_clip", "onnx"], tmp_path / "out", None, "", Terminal())


def test_stablehlo_runs_any_option(made, tmp_path):
  importer.import_model(f"transformers:{made / 'dinov3'}", tmp_path / "workdir")
  source = load_source(tmp_path / "workdir")
  assert exporting.export(source, ["stablehlo"], tmp_path / "out", None, "", Terminal())
  rows = json.loads((tmp_path / "out/stablehlo/parity.json").read_text())["rows"]
  assert {"image/tokens", "image/pooled"} <= {row["name"] for row in rows}


def test_clip_tokenizer(tmp_path):
  """Ids of the imported tokenizer equal those of transformers, and of open_clip but for padding."""
  folder = tmp_path / "clip"
  texts = [
    "A photo of a Dog", "", "naïve   café 東京 😀 don't 3.5%", "word " * 99,
    "x" * 300, "it's\n\tok!",
  ]  # fmt: skip
  command = [str(client_env.find_python()), "-c", TOKENIZER, str(folder), json.dumps(texts)]
  kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  done = subprocess.run(
    command, env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  theirs, plain = (np.array(ids) for ids in json.loads(done.stdout.splitlines()[-1]))
  tower = ov_models.TextConfig(
    width=8, depth=1, mlp_dim=8, num_heads=1, vocab_size=49408, max_len=20, pool="argmax",
    mask="causal", padding="attend",
  )  # fmt: skip
  words, notes = hf_tokenizer.read_folder(folder, tower)
  assert words is not None and notes == []
  assert (words.bos_id, words.eos_id, words.pad_id) == (49406, 49407, 49407)
  tokenizer = importer._tokenizer(words)
  processor = ov_data.TextProcessor(tokenizer, 20, False, "argmax", "attend", False)
  np.testing.assert_array_equal(processor.encode(texts), theirs)
  preset = ov_data.TextProcessor.from_preset("clip", folder / "tokenizer.json", length=20)
  assert preset.fingerprint == processor.fingerprint
  ends = plain.argmax(1)
  padded = np.where(np.arange(20) > ends[:, None], 49407, plain)
  np.testing.assert_array_equal(padded, theirs)
  processor.save(tmp_path / "saved")
  again = ov_data.TextProcessor.load(tmp_path / "saved")
  np.testing.assert_array_equal(again.encode_prompts(texts), theirs)
