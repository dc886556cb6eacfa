"""Ids of imported and exported tokenizers equal those of the classes of transformers and open_clip.

The vocabularies are trained here: a SentencePiece-like unigram vocabulary for SigLIP, and BPE with
byte fallback for SigLIP 2. SiglipTokenizer itself needs the SentencePiece library; its ids are in
ov_data/text_presets_test.py.
"""

import json
import os
from pathlib import Path
import subprocess
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from apps.exporter import exporting, importer
from apps.exporter.source import load_source
from apps.trainer.progress import Terminal
from ov_convert import client_env, hf_tokenizer, open_clip_config
from ov_convert.testing import foreign
import ov_data
import ov_models

LENGTH = 16
CORPUS = [
  "a photo of a red circle above a blue square", "two dogs play under a green tree, near a house",
  "the owner's café in a sunny street; it's naïve", "东京 タワー, größe und straße!",
  "I don't know",
]  # fmt: skip
TEXTS = [
  "A photo of a RED circle!", "", "   ", "!?", "dog " * 99, "don't, it's  a_cat </s> dog", "</s>",
  "<eos> a <pad> <bos> b", "tab\tand\nline", "東京 Tower 😀👍🏽", "Café naïve GRÖSSE",
  "  lead  trail ",
  "x" * 300, "<|endoftext|>", "a.b-c",
]  # fmt: skip
SIZES = {
  "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4
}  # fmt: skip
PREPROCESSOR = {
  "image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24},
  "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
# Prints ids by name: of a class of transformers, of AutoTokenizer, or of open_clip.
RUN = """
import json, sys
import open_clip, transformers

texts, length, jobs = json.loads(sys.argv[1])
found = {}
for name, (kind, folder, options) in jobs.items():
  if kind == "open_clip":
    found[name] = open_clip.get_tokenizer(f"local-dir:{folder}", **options)(texts).tolist()
    continue
  tokenizer = getattr(transformers, kind).from_pretrained(folder, **options)
  found[name] = tokenizer(
    texts, padding="max_length", truncation=True, max_length=length
  ).input_ids
print(json.dumps(found))
"""


def unigram(folder: Path) -> None:
  """Write a tokenizer as T5Tokenizer of transformers does, with the settings of SigLIP."""
  backend = tokenizers.Tokenizer(models.Unigram())
  backend.normalizer = normalizers.NFKC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  backend.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
    show_progress=False,
  )  # fmt: skip
  backend.train_from_iterator([text.lower() for text in CORPUS] * 30, trainer)
  write(folder, json.loads(backend.to_str()), "</s>")
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
  settings |= {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_fallback(folder: Path) -> None:
  """Write a tokenizer as GemmaTokenizer of transformers does, with the settings of SigLIP 2."""
  special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
  backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  backend.normalizer = normalizers.Replace(" ", "▁")
  backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
    limit_alphabet=40, show_progress=False,
  )  # fmt: skip
  backend.train_from_iterator([text.lower() for text in CORPUS] * 30, trainer)
  content = json.loads(backend.to_str())
  content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
  write(folder, content, "<eos>")
  settings: dict[str, Any] = {"tokenizer_class": "GemmaTokenizer", "split_special_tokens": True}
  settings |= {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
  settings |= {role: f"<{role[:3]}>" for role in ("pad_token", "eos_token", "bos_token")}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write(folder: Path, content: dict[str, Any], end: str) -> None:
  """Write tokenizer.json, which adds the end token."""
  parts = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
  content["post_processor"] = {
    "type": "TemplateProcessing", "single": parts, "pair": parts,
    "special_tokens": {end: {"id": end, "ids": [1], "tokens": [end]}},
  }  # fmt: skip
  (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")


FAMILIES = {"siglip": unigram, "siglip2": byte_fallback}


def ids_of(jobs: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the ids of TEXTS by classes of the libraries, by name."""
  command = [str(client_env.find_python()), "-c", RUN, json.dumps([TEXTS, LENGTH, jobs])]
  kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  done = subprocess.run(
    command, env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return {name: np.array(ids) for name, ids in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The folder of two SigLIP models, made by transformers, with their tokenizers."""
  root = tmp_path_factory.mktemp("models")
  specs, inputs = [], {}
  rng = np.random.default_rng(0)
  vision = SIZES | {"image_size": 24, "patch_size": 8}
  text = SIZES | {
    "vocab_size": 420, "max_position_embeddings": LENGTH, "projection_size": 32
  }  # fmt: skip
  for family in FAMILIES:
    specs.append({
      "name": family, "library": "transformers", "depth": 2, "kind": "SiglipModel",
      "text_depth": 2, "fields": {"vision_config": vision, "text_config": text},
    })  # fmt: skip
    inputs[family] = {
      "pixels": rng.normal(size=(1, 24, 24, 3)).astype(np.float32),
      "ids": rng.integers(0, 100, (1, LENGTH)),
    }
  foreign.make(root, specs, inputs)
  for family, write in FAMILIES.items():
    write(root / family)
    (root / family / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
  return root


@pytest.mark.parametrize("family", FAMILIES)
def test_import_keeps_the_tokenizer_and_export_writes_it_back(family, made, tmp_path):
  lines = importer.import_model(f"transformers:{made / family}", tmp_path / "workdir")
  assert not any("tokenizer" in line for line in lines)
  processor = ov_data.TextProcessor.load(tmp_path / "workdir" / "tokenizer")
  assert (processor.length, processor.append_cls) == (LENGTH, False)
  assert (processor.pool, processor.padding, processor.canonical) == ("last", "attend", False)
  preset = ov_data.TextProcessor.from_preset(
    family, made / family / "tokenizer.json", length=LENGTH
  )
  assert preset.fingerprint == processor.fingerprint

  source = load_source(tmp_path / "workdir")
  out = tmp_path / "out"
  assert exporting.export(source, ["transformers"], out, None, "", Terminal())
  rows = json.loads((out / "transformers/parity.json").read_text())["rows"]
  assert {"text/ids", "text/embedding", "logits"} <= {row["name"] for row in rows}
  written = str(out / "transformers")
  jobs: dict[str, Any] = {"auto": ("AutoTokenizer", written, {})}
  if family == "siglip2":
    # The class builds its text processing itself, from the vocabulary and the merges.
    jobs["class"] = ("Siglip2Tokenizer", written, {})
    original = {"padding_side": "right", "split_special_tokens": True}
    jobs["original"] = ("Siglip2Tokenizer", str(made / family), original)
  ours = processor.encode(TEXTS)
  for name, ids in ids_of(jobs).items():
    np.testing.assert_array_equal(ids, ours, name)
  importer.import_model(f"transformers:{written}", tmp_path / "again")
  again = ov_data.TextProcessor.load(tmp_path / "again" / "tokenizer")
  np.testing.assert_array_equal(again.encode(TEXTS), ours)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_open_clip(family, clean, tmp_path):
  """The ids of a folder for open_clip, and of the folder that is written from it."""
  given, written = tmp_path / "given", tmp_path / "written"
  text = ov_models.TextConfig(
    width=8, depth=1, mlp_dim=8, num_heads=1, vocab_size=420, max_len=LENGTH, padding="attend"
  )
  settings = {"context_length": LENGTH, "hf_tokenizer_name": "the files in this folder"}
  for folder, more in ((given, {"tokenizer_kwargs": {"clean": clean}}), (written, {})):
    folder.mkdir()
    content = {"model_cfg": {"text_cfg": settings | more}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
  FAMILIES[family](given)
  words, notes = hf_tokenizer.read_folder(given, text, append_cls=True, open_clip={"clean": clean})
  assert words is not None and not notes
  assert not open_clip_config.masks_padding(text)
  hf_tokenizer.write_tokenizer(written, words, template=True)
  processor = ov_data.TextProcessor(
    importer._tokenizer(words), LENGTH, False, "last", "attend", canonical=False
  )
  found = ids_of({name: ("open_clip", str(tmp_path / name), {}) for name in ("given", "written")})
  np.testing.assert_array_equal(found["given"], found["written"])
  # open_clip always collapses white space, which "whitespace" does not put into the file.
  texts = TEXTS if clean == "canonicalize" else [" ".join(text.split()) for text in TEXTS]
  np.testing.assert_array_equal(found["given"], processor.encode(texts))


def test_sentencepiece_files_alone_are_refused(made, tmp_path):
  (tmp_path / "model").mkdir()
  for file in (made / "siglip").iterdir():
    if not file.name.startswith("tokenizer"):
      (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
  (tmp_path / "model" / "spiece.model").write_bytes(b"\n")
  with pytest.raises(ValueError, match=r"has spiece.model, .* no tokenizer.json; convert it"):
    importer.import_model(f"transformers:{tmp_path / 'model'}", tmp_path / "workdir")
  assert not (tmp_path / "workdir").exists()
