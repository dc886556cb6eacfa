"""Ids of the presets equal those of the tokenizer classes of transformers and open_clip."""

import json
import pathlib
import re
import string
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ov_data import text_cleaning, text_presets, tokenizer_folder
from ov_data.text_processor import TextProcessor
from ov_data.tokenizer import Tokenizer

_GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "testdata" / "family_tokens.json").read_text("utf-8")
)
_CAPTIONS = ["a photo of a red circle", "two dogs play under a green tree", "the sunny street"]


def _write(folder: pathlib.Path, family: str) -> pathlib.Path:
  path = folder / "tokenizer.json"
  path.write_text(json.dumps(_GOLDEN[family]["tokenizer"]), "utf-8")
  return path


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_golden_ids(family: str, library: str, tmp_path: pathlib.Path):
  processor = TextProcessor.from_preset(
    family,
    _write(tmp_path, family),
    length=_GOLDEN["length"],
    clean=None if library == "transformers" else "canonicalize",
  )
  expected = _GOLDEN[family]["ids" if library == "transformers" else "ids_open_clip"]
  for text, row, wanted in zip(
    _GOLDEN["texts"], processor.encode(_GOLDEN["texts"]).tolist(), expected, strict=True
  ):
    assert row == wanted, text
  processor.save(tmp_path / "saved")
  loaded = TextProcessor.load(tmp_path / "saved")
  assert loaded.fingerprint == processor.fingerprint
  assert loaded.tokenizer.fingerprint == processor.tokenizer.fingerprint
  assert loaded.encode(_GOLDEN["texts"]).tolist() == expected
  # A text alone uses another path of the library than a large batch.
  np.testing.assert_array_equal(
    processor.encode(["Red-dog"] * 99)[98], loaded.encode(["Red-dog"])[0]
  )


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_rows(family: str, tmp_path: pathlib.Path):
  """Rows have the length of the models, no [bos], and end with the end token if too long."""
  processor = TextProcessor.from_preset(family, _write(tmp_path, family))
  tokenizer = processor.tokenizer
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id) == (None, 1, None)
  assert tokenizer.pad_id == (1 if family == "siglip" else 0)
  empty, long = processor.encode(["", "a " * 200])
  assert empty.tolist() == [1] + [tokenizer.pad_id] * 63
  assert long[-1] == 1 and (long[:-1] > 3).all()
  text = "a red dog" if family == "siglip" else "a red dog, 東京 😀 größe!"
  assert tokenizer.decode(processor.encode([text.title()])[0]) == text
  ids, mask = tokenizer.encode_batch(["a"], 5)
  assert mask.tolist() == [(np.arange(5) < ids[0].tolist().index(1) + 1).tolist()]


def test_unigram_and_byte_fallback_of_the_library(tmp_path: pathlib.Path):
  """Vocabularies trained with the tokenizers library work like those of SentencePiece."""
  unigram = tokenizers.Tokenizer(models.Unigram())
  unigram.pre_tokenizer = pre_tokenizers.Metaspace()
  unigram.decoder = decoders.Metaspace()
  special = ["<pad>", "</s>", "<unk>"]
  trainer = trainers.UnigramTrainer(
    vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
  )
  unigram.train_from_iterator(_CAPTIONS * 20, trainer)
  unigram.save(str(tmp_path / "unigram.json"))
  siglip = TextProcessor.from_preset("siglip", tmp_path / "unigram.json")
  rows = siglip.encode(["A photo, of a RED circle!", "a photo of a red circle", "</s>", "s"])
  assert rows[0].tolist() == rows[1].tolist() and rows[2].tolist() == rows[3].tolist()
  assert siglip.decode(rows[:1]) == ["a photo of a red circle"]

  pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
  letters = sorted(set("".join(_CAPTIONS).replace(" ", "▁")))
  vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters, "re", "red"])}
  bpe = tokenizers.Tokenizer(
    models.BPE(
      vocabulary, [("r", "e"), ("re", "d")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
  )
  bpe.normalizer = normalizers.Replace(" ", "▁")
  bpe.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  bpe.save(str(tmp_path / "bpe.json"))
  siglip2 = TextProcessor.from_preset("siglip2", tmp_path / "bpe.json")
  row = siglip2.encode(["RED 東"])[0]
  expected = [vocabulary[p] for p in ("red", "▁", "<0xE6>", "<0x9D>", "<0xB1>", "<eos>")]
  assert row.tolist() == expected + [0] * 58
  assert siglip2.decode(row[None]) == ["red 東"]


def test_fingerprint_covers_special_tokens_and_cleaning(tmp_path: pathlib.Path):
  path = _write(tmp_path, "siglip")
  special = dict(text_presets.PRESETS["siglip"].special or {})
  made = [
    Tokenizer.from_file(path, special=special),
    Tokenizer.from_file(path, special=special | {"pad": "<pad>"}),
    Tokenizer.from_file(path, special=special | {"bos": "<pad>"}),
    Tokenizer.from_file(path, special=special, clean="lower"),
    Tokenizer.from_file(path, special=special, clean="siglip"),
    Tokenizer.from_file(path, special=special, clean="canonicalize"),
  ]
  assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
  made[-1].save(tmp_path / "saved")
  again = Tokenizer.from_file(
    tmp_path / "saved" / "tokenizer.json", special=special, clean="canonicalize"
  )
  assert again.fingerprint == made[-1].fingerprint  # the cleaning is not added twice


@pytest.mark.parametrize("clean", ["siglip", "canonicalize"])
def test_cleaning_equals_python(clean: text_cleaning.Clean):
  """All characters of the Basic Multilingual Plane but the newest letters, and random texts."""
  cleaning = normalizers.Sequence(text_cleaning.steps(clean))

  def expected(text: str) -> str:
    if clean == "canonicalize":
      text = re.sub("[\u02bc\u2018-\u201f]", "", unicodedata.normalize("NFC", text))
      text = text.replace("_", " ")
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()

  characters = [chr(i) for i in range(0xFFFF) if not 0xD800 <= i < 0xE000]
  different = [c for c in characters if cleaning.normalize_str(f"a{c}b") != expected(f"a{c}b")]
  assert all(c == "\u1c89" or "\ua7cb" <= c <= "\ua7dc" for c in different)  # Unicode 15 to 16
  rng = np.random.default_rng(0)
  for _ in range(2000):
    text = "".join(rng.choice(list("ΑΣσ .,-’_aB\u0301\u00a0\x1d\u2028İ"), rng.integers(0, 8)))
    words = cleaning.normalize_str(text)
    # Final sigma is recognized after one mark of punctuation only.
    assert words.replace("ς", "σ") == expected(text).replace("ς", "σ"), repr(text)
  assert cleaning.normalize_str("ΟΔΟΣ, ΑΣ. Σ") == "οδος ας σ"


def test_invalid_presets(tmp_path: pathlib.Path):
  path = _write(tmp_path, "siglip")
  with pytest.raises(ValueError, match="preset='t5': expected one of clip, siglip, siglip2"):
    TextProcessor.from_preset("t5", path)
  with pytest.raises(ValueError, match="'pad': '<pad>'|'eos': '<eos>'"):
    TextProcessor.from_preset("siglip2", path)
  with pytest.raises(ValueError, match="clean='upper': expected one of none, lower"):
    TextProcessor.from_preset("siglip", path, clean="upper")  # type: ignore[arg-type]
  with pytest.raises(ValueError, match=r"special=\{'end': '</s>'\}: expected a role"):
    Tokenizer.from_file(path, special={"end": "</s>"})
  with pytest.raises(ValueError, match=r"no \[PAD\] or <pad>"):
    Tokenizer.from_file(path, special={"eos": "</s>"})


@pytest.mark.parametrize("special", [3, ["pad"], {"pad": 1}, {"end": "</s>"}])
def test_damaged_packing(special: object, tmp_path: pathlib.Path):
  TextProcessor.from_preset("siglip", _write(tmp_path, "siglip")).save(tmp_path / "saved")
  file = tmp_path / "saved" / "packing.json"
  content = json.loads(file.read_text("utf-8"))
  for name in ("format", "sha256"):
    del content[name]
  file.write_bytes(tokenizer_folder.seal(content | {"special": special}))
  with pytest.raises(ValueError):
    Tokenizer.load(tmp_path / "saved")
