"""Tests of writing and reading tokenizer files.

That transformers and open_clip make the same ids of these files is tested where they are run:
open_clip_test.py.
"""

import dataclasses
import json

import pytest

from ov_convert import hf_tokenizer, reading
from ov_convert.release import TokenizerSpec
import ov_models

TOKENS = ("[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "red", "circle", "##s")
CONTENT = {
  "version": "1.0",
  "truncation": {"max_length": 7, "direction": "Right", "strategy": "LongestFirst", "stride": 0},
  "padding": None,
  "added_tokens": [],
  "normalizer": {"type": "Lowercase"},
  "pre_tokenizer": {"type": "BertPreTokenizer"},
  "post_processor": None,
  "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
  "model": {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {token: i for i, token in enumerate(TOKENS)},
  },
}
WORDS = TokenizerSpec(
  json.dumps(CONTENT), 8, True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, cls_id=4
)


@pytest.mark.parametrize("template", [False, True])
def test_written_files(tmp_path, template):
  hf_tokenizer.write_tokenizer(tmp_path, WORDS, template=template)
  content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
  # Normalization and pre-tokenization are unchanged; the post-processor is replaced.
  for name in ("normalizer", "pre_tokenizer", "model", "decoder"):
    assert content[name] == CONTENT[name]
  assert content["truncation"] is None
  assert [(t["id"], t["content"], t["special"]) for t in content["added_tokens"]] == [
    (i, TOKENS[i], True) for i in range(5)
  ]
  config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert config["split_special_tokens"] is True
  assert (config["bos_token"], config["cls_token"]) == ("[bos]", "[CLS]")
  assert config.get("model_max_length") == (8 if template else None)
  processor = content["post_processor"]
  if template:
    assert [next(iter(part)) for part in processor["single"]] == [
      "SpecialToken", "Sequence", "SpecialToken"
    ]  # fmt: skip
    assert processor["special_tokens"]["[eos]"]["ids"] == [2]
  else:
    assert processor is None


def test_an_id_without_token_is_refused(tmp_path):
  wrong = TokenizerSpec(json.dumps(CONTENT), 8, False, pad_id=0, bos_id=1, eos_id=99)
  with pytest.raises(ValueError, match="eos_id=99 is not an id of the tokenizer"):
    hf_tokenizer.write_tokenizer(tmp_path, wrong, template=True)
  assert not list(tmp_path.iterdir())


def test_round_trip(tmp_path):
  hf_tokenizer.write_tokenizer(tmp_path, WORDS, template=False)
  text = (tmp_path / "tokenizer.json").read_text("utf-8")
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
  for known in (settings, {}):  # names are found by custom too
    found = hf_tokenizer.tokenizer_spec_from(text, known, length=8, append_cls=True)
    ids = (found.pad_id, found.bos_id, found.eos_id, found.unk_id, found.cls_id)
    assert ids == (0, 1, 2, 3, 4)
  # Those that the settings name come first; either form of naming is known.
  settings = {"bos_token": {"content": "red"}, "eos_token": "circle"}
  found = hf_tokenizer.tokenizer_spec_from(text, settings, length=8, append_cls=False)
  assert (found.bos_id, found.eos_id) == (5, 6)


def test_pieces_with_scores(tmp_path):
  """Unigram models list their pieces; the place is the id."""
  model = {"type": "Unigram", "unk_id": 3, "vocab": [[token, -1.5] for token in TOKENS]}
  text = json.dumps(CONTENT | {"model": model})
  found = hf_tokenizer.tokenizer_spec_from(text, {}, length=8, append_cls=True)
  assert (found.bos_id, found.cls_id, found.token(6)) == (1, 4, "circle")
  hf_tokenizer.write_tokenizer(tmp_path, found, template=False)
  assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "[eos]"


def test_reading_other_tokenizers():
  stock = json.loads(json.dumps(CONTENT))
  for token in ("[bos]", "[CLS]"):
    del stock["model"]["vocab"][token]
  with pytest.raises(ValueError, match=r"no token for bos, cls among its 6.*bos: \[bos\] or"):
    hf_tokenizer.tokenizer_spec_from(json.dumps(stock), {}, length=8, append_cls=True)
  for broken in ("{", "[]", "{}", '{"model": {"vocab": 3}}'):
    with pytest.raises(ValueError, match="is not a file of the tokenizers library"):
      hf_tokenizer.tokenizer_spec_from(broken, {}, length=8, append_cls=False)


SIGLIP_TOKENS = ("<pad>", "</s>", "<unk>", "<bos>", "<eos>", "▁red", "▁", "s")
UNIGRAM = {"type": "Unigram", "unk_id": 2, "vocab": [[token, -1.0] for token in SIGLIP_TOKENS]}
BPE = {
  "type": "BPE", "byte_fallback": True, "merges": [],
  "vocab": {token: i for i, token in enumerate(SIGLIP_TOKENS)},
}  # fmt: skip
TOWER = ov_models.TextConfig(
  width=8, depth=1, mlp_dim=8, num_heads=1, vocab_size=8, max_len=6, padding="attend"
)


def write_siglip(folder, model, settings=None):
  content = CONTENT | {"model": model, "normalizer": {"type": "NFKC"}}
  (folder / "tokenizer.json").write_text(json.dumps(content))
  if settings is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def steps(words):
  return [step["type"] for step in json.loads(words.tokenizer_json)["normalizer"]["normalizers"]]


@pytest.mark.parametrize(
  ("model", "ids", "cleaning"),
  [
    (UNIGRAM, (1, None, 1), ["Replace", "Lowercase", "Replace", "Replace", "Strip"]),
    (BPE, (0, None, 4), ["Lowercase"]),
  ],
)
def test_siglip(model, ids, cleaning, tmp_path):
  """Texts have no [bos], SigLIP pads with its end token, and the cleaning precedes the file's."""
  write_siglip(tmp_path, model, {"bos_token": "<bos>", "padding_side": "left", "pad_token": None})
  words, notes = hf_tokenizer.read_folder(tmp_path, TOWER, append_cls=True)
  assert words is not None and notes == [
    "texts are padded on the right, not on the left: the last column is pooled"
  ]
  assert (words.pad_id, words.bos_id, words.eos_id) == ids
  assert (words.length, words.append_cls, words.cls_id) == (6, False, None)
  assert steps(words) == [*cleaning, "NFKC"]
  out = tmp_path / "out"
  out.mkdir()
  hf_tokenizer.write_tokenizer(out, words, template=True)
  content = json.loads((out / "tokenizer.json").read_text("utf-8"))
  assert [next(iter(part)) for part in content["post_processor"]["single"]] == [
    "Sequence", "SpecialToken"
  ]  # fmt: skip
  config = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
  assert "bos_token" not in config and config["padding_side"] == "right"
  again, notes = hf_tokenizer.read_folder(out, TOWER)
  assert again is not None and steps(again) == steps(words) and not notes


def test_cleaning_of_open_clip(tmp_path):
  write_siglip(tmp_path, UNIGRAM)
  for given, expected in (
    ({}, ["NFKC"]),
    ({"clean": "lower"}, ["Lowercase", "NFKC"]),
    ({"clean": "canonicalize"}, ["NFC", "Replace", "Replace", "Replace", "Lowercase", "Replace",
                                 "Replace", "Strip", "NFKC"]),
  ):  # fmt: skip
    words, notes = hf_tokenizer.read_folder(tmp_path, TOWER, append_cls=True, open_clip=given)
    assert words is not None and not notes
    content = json.loads(words.tokenizer_json)["normalizer"]
    assert (steps(words) if "normalizers" in content else [content["type"]]) == expected
  words, notes = hf_tokenizer.read_folder(tmp_path, TOWER, open_clip={"clean": "upper"})
  assert words is None and "tokenizer_kwargs.clean='upper' (supported: whitespace" in notes[0]


def test_other_towers_have_a_begin_token(tmp_path):
  """Only towers that read the last column, with padding, have the texts of SigLIP."""
  write_siglip(tmp_path, BPE)
  tower = dataclasses.replace(TOWER, pool="mean", padding="mask")
  words, _ = hf_tokenizer.read_folder(tmp_path, tower)
  assert words is not None and words.bos_id == 3


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_sentencepiece_without_tokenizer_json_is_refused(name, tmp_path):
  assert hf_tokenizer.read_folder(tmp_path, TOWER)[0] is None
  (tmp_path / name).write_bytes(b"\n")
  with pytest.raises(ValueError, match=f"has {name}, which needs SentencePiece, but no tokenizer"):
    hf_tokenizer.read_folder(tmp_path, TOWER)


def test_size_of_tokenizer_json(monkeypatch, tmp_path):
  """A vocabulary may be larger than other JSON files, but is bounded."""
  write_siglip(tmp_path, UNIGRAM)
  monkeypatch.setattr(reading, "MAX_JSON_BYTES", 10)
  assert hf_tokenizer.read_folder(tmp_path, TOWER)[0] is not None
  monkeypatch.setattr(reading, "MAX_TOKENIZER_BYTES", 10)
  with pytest.raises(ValueError, match="bytes; expected at most 10 for JSON"):
    hf_tokenizer.read_folder(tmp_path, TOWER)
