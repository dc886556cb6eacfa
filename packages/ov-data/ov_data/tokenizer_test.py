"""Tokenizer: golden ids, packing, training, saved folders, and invalid vocabularies."""

from concurrent import futures
import json
import os
import pathlib
import pickle
import string
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from ov_data import bert
from ov_data.tokenizer import MAX_CHARS, Tokenizer, canonicalise_text

_GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "testdata" / "tokens.json").read_text("utf-8")
)
_VOCABULARY = "bert_base_vocab_bos_eos.txt"
_CAPTIONS = [
  "a large red striped circle above a small blue solid square",
  "a small green dotted star left of a large pink checkered heart",
  "a large blue solid triangle",
]


@pytest.fixture(scope="module")
def bert_vocabulary() -> pathlib.Path:
  """Vocabulary of the golden ids, which cannot be distributed with this repository."""
  places = [os.environ["OV_GOLDEN"]] if os.environ.get("OV_GOLDEN") else []
  here = pathlib.Path(__file__).absolute()
  places += [str(parent / "shared" / "golden") for parent in here.parents]
  for place in places:
    if (pathlib.Path(place) / _VOCABULARY).is_file():
      return pathlib.Path(place) / _VOCABULARY
  pytest.skip(f"SKIPPED: {_VOCABULARY} not found; set OV_GOLDEN to the folder that holds it")


@pytest.fixture
def words() -> Tokenizer:
  return Tokenizer.train(_CAPTIONS, 100, kind="words")


def _write_vocabulary(path: pathlib.Path, tokens: list[str]) -> pathlib.Path:
  path.write_text("\n".join(tokens) + "\n", "utf-8")
  return path


@pytest.mark.parametrize("i", range(len(_GOLDEN)))
def test_golden_ids(bert_vocabulary: pathlib.Path, i: int):
  """Labels and packing lengths equal those of the released OpenVision code."""
  golden = _GOLDEN[i]
  plain = Tokenizer.from_vocab(bert_vocabulary)
  with_cls = Tokenizer.from_vocab(bert_vocabulary, append_cls=True)
  text = golden["text"]
  ids_80, _ = with_cls.encode_batch([text], 80)
  assert ids_80[0].tolist() == golden["eval_80"] == golden["openvision1_labels1_80"]
  ids_128, mask = with_cls.encode_batch([text], 128)
  assert ids_128[0].tolist() == golden["openvision2_labels_128"]
  # The caption mask marks real next tokens; [CLS], the last column, is never a target.
  assert mask[0, 1:-1].astype(int).tolist() == golden["openvision2_cap_loss_mask"][:-1]
  assert golden["openvision2_cap_loss_mask"][-1] == 0
  ids, mask = plain.encode_batch([text], 128)
  assert [*ids[0, 1:].tolist(), 0] == golden["openvision1_autoreg_labels_128"]
  assert [*mask[0, 1:].astype(int).tolist(), 0] == golden["openvision1_cap_loss_mask_128"]
  assert ids.dtype == np.int32 and mask.dtype == bool


def test_golden_vocabulary(bert_vocabulary: pathlib.Path):
  tokenizer = Tokenizer.from_vocab(bert_vocabulary, append_cls=True)
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
  assert (tokenizer.unk_id, tokenizer.cls_id, tokenizer.vocab_size) == (100, 101, 30522)
  tokenizer.check_fits(32000)
  with pytest.raises(ValueError, match="30522 tokens.*vocab_size is 30000.*at least 30522"):
    tokenizer.check_fits(30000)


@pytest.mark.parametrize(
  ("text", "same_as"),
  [
    ("½ price™… №5 ﬁne", "1\u20442 pricetm... no5 fine"),  # compatibility characters
    ("ＦＵＬＬ width", "full width"),
    ("straße ΟΔΟΣ", "strasse οδοσ"),  # case folding, not lower case
    ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
    ("tab\x07bell", "tab bell"),
    ("Ça\u0301 va", "ca va"),
  ],
)
def test_text_is_prepared_as_in_the_released_code(
  bert_vocabulary: pathlib.Path, text: str, same_as: str
):
  """Compared with TensorFlow Text 2.21; `test_golden_ids` covers plain text."""
  tokenizer = Tokenizer.from_vocab(bert_vocabulary)
  assert tokenizer.encode(text) == tokenizer.encode(same_as)
  assert tokenizer.unk_id not in tokenizer.encode(text)


def test_packing(words: Tokenizer):
  ids, mask = words.encode_batch(["a large red", "", "a large red circle above a small"], 6)
  a, large, red, circle = words.encode("a large red circle")
  assert ids.tolist() == [
    [1, a, large, red, 2, 0],
    [1, 2, 0, 0, 0, 0],
    [1, a, large, red, circle, 2],  # the last slot is overwritten with [eos]
  ]
  assert mask.tolist() == (ids != 0).tolist()


def test_packing_with_cls():
  tokenizer = Tokenizer.train(_CAPTIONS, 100, kind="words", append_cls=True)
  ids, mask = tokenizer.encode_batch(["a large", "a large red circle above"], 6)
  a, large, red, _ = tokenizer.encode("a large red circle")
  cls = tokenizer.cls_id
  assert ids.tolist() == [[1, a, large, 2, 0, cls], [1, a, large, red, 2, cls]]
  assert mask[0].tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("own", [False, True])
def test_append_cls_of_a_call_overrides_the_setting(own: bool):
  tokenizers = {c: Tokenizer.train(_CAPTIONS, 100, append_cls=c) for c in (False, True)}
  for append_cls in (False, True):
    ids, mask = tokenizers[own].encode_batch(_CAPTIONS, 9, append_cls)
    expected, expected_mask = tokenizers[append_cls].encode_batch(_CAPTIONS, 9)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(mask, expected_mask)


def test_append_cls_needs_the_token(tmp_path: pathlib.Path):
  path = _write_vocabulary(tmp_path / "vocab.txt", [*_SPECIALS, "a"])
  with pytest.raises(ValueError, match=r"append_cls: no \[CLS\]"):
    Tokenizer.from_vocab(path).encode_batch(["a"], 8, append_cls=True)


def test_exact_fit_is_not_truncated(words: Tokenizer):
  ids, _ = words.encode_batch(["a large red circle"], 6)
  assert words.decode(ids[0]) == "a large red circle" and ids[0, -1] == 2


@pytest.mark.parametrize(("append_cls", "length"), [(False, 1), (True, 2), (False, -3)])
def test_length_without_room(append_cls: bool, length: int):
  tokenizer = Tokenizer.train(_CAPTIONS, 100, append_cls=append_cls)
  with pytest.raises(ValueError, match=f"length={length} is too short"):
    tokenizer.encode_batch(["a"], length)


def test_empty_batch(words: Tokenizer):
  ids, mask = words.encode_batch([], 5)
  assert ids.shape == mask.shape == (0, 5)


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_decode_inverts_encode(kind: str):
  tokenizer = Tokenizer.train(_CAPTIONS, 300, kind=kind)
  ids, _ = tokenizer.encode_batch(_CAPTIONS, 40)
  assert tokenizer.decode_batch(ids) == _CAPTIONS


def test_decode_skips_special_ids(words: Tokenizer):
  a = words.encode("a")[0]
  assert words.decode([1, a, 0, 31999, -1, a, 2, a]) == "a a"
  assert words.decode(np.array([2, a], np.int32)) == ""
  assert words.decode([]) == ""


def test_special_tokens_in_a_caption_are_text(words: Tokenizer, tmp_path: pathlib.Path):
  words.save(tmp_path)
  for tokenizer in (words, Tokenizer.load(tmp_path)):
    ids = tokenizer.encode("a [eos] [PAD] [bos]")
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_special_tokens_of_a_foreign_file_are_text(tmp_path: pathlib.Path):
  """Other programs store them as added tokens, which match inside texts by default."""
  backend = Tokenizer.train(_CAPTIONS, 300)._backend
  backend.add_special_tokens(["[PAD]", "[bos]", "[eos]"])
  backend.enable_padding(length=7)
  backend.enable_truncation(3)
  backend.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
  assert tokenizer.eos_id == 2
  ids, _ = tokenizer.encode_batch(["a [eos] large red circle"], 20)
  row = ids[0].tolist()
  assert row.count(2) == 1 and tokenizer.decode(row).endswith("large red circle")


def test_unusual_input_never_raises(words: Tokenizer):
  texts: list[str | bytes] = [
    "x" * 5_000_000,
    " " * 5_000_000,
    "a " * 3_000_000,
    "\ud800 lone surrogate",
    b"caf\xe9 not utf-8",
    b"\xff" * 1_000_000,
    "\0",
    "😀",
  ]
  ids, mask = words.encode_batch(texts, 12)
  assert ids.shape == (8, 12) and ids.max() < words.vocab_size
  assert mask[:, 0].all() and mask[:, 1].all()


def test_bytes_encode_as_their_text(words: Tokenizer):
  both, _ = words.encode_batch(["a large étoile", "a large étoile".encode()], 12)
  np.testing.assert_array_equal(both[0], both[1])


def _alone(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
  """Return the packed ids of the library with the normalizer of the file."""
  ids = tokenizer.encode(text)[: length - 2]
  row = [tokenizer.bos_id, *ids, tokenizer.eos_id]
  return row + [tokenizer.pad_id] * (length - len(row))


def test_ascii_texts_use_a_fast_path_with_equal_ids(tmp_path: pathlib.Path):
  characters = [chr(i) for i in range(128)]
  words = [f"{a}{b}" for a in "ab" for b in "abc"]
  tokens = ["[PAD]", "[bos]", "[eos]", "[UNK]", *string.punctuation, "a", "##a", "##b", "b", *words]
  path = _write_vocabulary(tmp_path / "vocab.txt", list(dict.fromkeys(tokens)))
  tokenizer = Tokenizer.from_vocab(path)
  tokenizer.save(tmp_path / "saved")
  rng = np.random.default_rng(0)
  texts = [f"ab{c}Ba" for c in characters] + ["", "[eos]", " a ", "b" * 101]
  texts += ["".join(rng.choice([*characters, *words], 12)) for _ in range(500)]
  for other in (tokenizer, Tokenizer.load(tmp_path / "saved")):
    want = [_alone(other, text, 16) for text in texts]
    many, _ = other.encode_batch(texts, 16)
    few = [other.encode_batch(texts[i : i + 8], 16)[0] for i in range(0, len(texts), 8)]
    assert many.tolist() == np.concatenate(few).tolist() == want
  assert tokenizer._ascii is not None


def test_foreign_text_preparation_has_no_fast_path():
  # This tokenizer keeps upper case and has a token that may contain a space.
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(
      {"[PAD]": 0, "[bos]": 1, "[eos]": 2, "[UNK]": 3, "A": 4, "a": 5}, unk_token="[UNK]"
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  assert Tokenizer(backend).encode_batch(["A a"], 4)[0].tolist() == [[1, 4, 5, 2]]
  backend.normalizer = bert.normalizer()
  backend.add_tokens(["a a"])
  assert Tokenizer(backend).encode_batch(["A a a"], 5)[0].tolist() == [[1, 6, 5, 2, 0]]


def test_threads_agree(words: Tokenizer):
  expected = words.encode_batch(_CAPTIONS, 20)[0]
  with futures.ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda _: words.encode_batch(_CAPTIONS, 20)[0], range(200)))
  assert all((r == expected).all() for r in results)


def test_pickle_keeps_ids(words: Tokenizer):
  copy = pickle.loads(pickle.dumps(words))
  np.testing.assert_array_equal(
    copy.encode_batch(_CAPTIONS, 20)[0], words.encode_batch(_CAPTIONS, 20)[0]
  )
  assert copy.encode("[eos]") == words.encode("[eos]")


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_training_is_deterministic_across_processes(kind: str):
  """Train in new processes with other hash seeds and another order of the texts."""
  program = (
    "import sys; from ov_data.tokenizer import Tokenizer; texts = eval(sys.argv[1]);"
    f"print(Tokenizer.train(texts, 60, kind={kind!r}).fingerprint)"
  )
  prints = set()
  for seed, texts in (("1", _CAPTIONS), ("2", _CAPTIONS[::-1])):
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    prints.add(
      subprocess.run(
        [sys.executable, "-c", program, repr(texts)],
        env=env,
        check=True,
        capture_output=True,
        text=True,
      ).stdout
    )
  assert len(prints) == 1
  assert prints.pop().strip() == Tokenizer.train(_CAPTIONS, 60, kind=kind).fingerprint


def test_trained_vocabulary():
  tokenizer = Tokenizer.train(_CAPTIONS, 12, kind="words")
  vocabulary = tokenizer._backend.get_vocab()
  by_id = sorted(vocabulary, key=vocabulary.__getitem__)
  assert by_id[:7] == ["[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  # "a" occurs 5 times, "large" 3 times, then words that occur twice in alphabetical order.
  assert by_id[7:] == ["a", "large", "blue", "small", "solid"]
  assert tokenizer.vocab_size == 12
  assert tokenizer.encode("a zebra") == [7, tokenizer.unk_id]


def test_min_frequency():
  tokenizer = Tokenizer.train(_CAPTIONS, 100, kind="words", min_frequency=2)
  assert tokenizer.vocab_size == 7 + 5
  assert tokenizer.encode("pink") == [tokenizer.unk_id]


def test_pieces_are_learnt_by_frequency_and_spell_unseen_words():
  tokenizer = Tokenizer.train(["low low low lower lowest newer newest"], 60)
  tokens = set(tokenizer._backend.get_vocab())
  assert {"low", "##er", "##est", "lower"} <= tokens
  assert tokenizer.unk_id not in tokenizer.encode("lowerest newewer")
  assert tokenizer.vocab_size <= 60


@pytest.mark.parametrize("vocab_size", [8, 12, 20])
def test_small_vocabularies_keep_their_limit(vocab_size: int):
  tokenizer = Tokenizer.train(_CAPTIONS, vocab_size)
  assert tokenizer.vocab_size == vocab_size
  assert tokenizer.encode_batch(_CAPTIONS, 10)[0].max() < vocab_size


def test_training_errors():
  with pytest.raises(ValueError, match="vocab_size=7: expected more than the 7"):
    Tokenizer.train(_CAPTIONS, 7)
  with pytest.raises(ValueError, match="contain no word"):
    Tokenizer.train(["", "  "], 100)
  with pytest.raises(ValueError, match="kind='bpe'"):
    Tokenizer.train(_CAPTIONS, 100, kind="bpe")


def test_save_and_load(tmp_path: pathlib.Path):
  for append_cls in (False, True):
    tokenizer = Tokenizer.train(_CAPTIONS, 200, append_cls=append_cls)
    folder = tmp_path / str(append_cls) / "tokenizer"
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.append_cls == append_cls and loaded.cls_id == tokenizer.cls_id
    np.testing.assert_array_equal(
      loaded.encode_batch(_CAPTIONS, 30)[0], tokenizer.encode_batch(_CAPTIONS, 30)[0]
    )
    assert sorted(p.name for p in folder.iterdir()) == ["packing.json", "tokenizer.json"]


def test_remote_folders_are_rejected(tmp_path: pathlib.Path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for folder in ("gs://bucket/tokenizer", pathlib.Path("gs://bucket/tokenizer")):
    with pytest.raises(ValueError, match="output gs://bucket/tokenizer: expected a local path"):
      Tokenizer.train(_CAPTIONS, 200).save(folder)
  assert not list(tmp_path.iterdir())


_SPECIALS = ["[PAD]", "[bos]", "[eos]", "[UNK]"]


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (["[PAD]", "[eos]", "[UNK]", "a"], r"no \[bos\] or .* token among 4"),
    (["[PAD]", "[unused0]", "[unused1]", "[UNK]"], "stock BERT vocabulary"),
    (["[bos]", "[eos]", "[UNK]"], r"no \[PAD\]"),
    (["[PAD]", "[bos]", "[eos]", "a"], r"no \[UNK\]"),
    ([*_SPECIALS, "a", "b", "a"], "line 7: 'a' is also on line 5"),
    ([*_SPECIALS, "", "b"], "line 5: empty"),
  ],
)
def test_wrong_vocabulary(tmp_path: pathlib.Path, tokens: list[str], message: str):
  path = _write_vocabulary(tmp_path / "vocab.txt", tokens)
  with pytest.raises(ValueError, match=message) as error:
    Tokenizer.from_vocab(path)
  assert str(path) in str(error.value)


def test_wrong_vocabulary_files(tmp_path: pathlib.Path):
  path = tmp_path / "vocab.txt"
  path.write_bytes(b"[PAD]\n[bos]\n\xff\xfe\n")
  with pytest.raises(ValueError, match="line 3: byte 0xff is not UTF-8; save the file as UTF-8"):
    Tokenizer.from_vocab(path)
  with pytest.raises(FileNotFoundError):
    Tokenizer.from_vocab(tmp_path / "none.txt")
  path = _write_vocabulary(path, _SPECIALS)
  with pytest.raises(ValueError, match=r"no \[CLS\]"):
    Tokenizer.from_vocab(path, append_cls=True)
  with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
    Tokenizer.from_file(path)


@pytest.mark.parametrize("read", [Tokenizer.from_vocab, Tokenizer.from_file])
def test_special_files_never_block(tmp_path: pathlib.Path, read):
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", "/dev/zero", tmp_path, ""):
    with pytest.raises(FileNotFoundError):
      read(path)
  with pytest.raises(FileNotFoundError, match="gs://a/vocab.txt: expected a local file; copy it"):
    read("gs://a/vocab.txt")


def test_empty_lines_at_the_end_of_a_vocabulary(tmp_path: pathlib.Path):
  path = _write_vocabulary(tmp_path / "vocab.txt", ["[PAD]", "[bos]", "[eos]", "[UNK]", "a"])
  path.write_bytes(path.read_bytes() + b"\n\r\n")
  assert Tokenizer.from_vocab(path).vocab_size == 5
  path.write_bytes(b"[PAD]\n\n[bos]\n")
  with pytest.raises(ValueError, match="line 2: empty; every line must be a token"):
    Tokenizer.from_vocab(path)


def test_vocabulary_with_byte_order_mark(tmp_path: pathlib.Path):
  plain = _write_vocabulary(tmp_path / "plain.txt", ["[PAD]", "[bos]", "[eos]", "[UNK]", "a"])
  marked = tmp_path / "marked.txt"
  marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
  ids = [
    Tokenizer.from_vocab(path).encode_batch(["a b"], 5)[0].tolist() for path in (plain, marked)
  ]
  assert ids[0] == ids[1] == [[1, 4, 3, 2, 0]]


def test_vocabulary_with_windows_line_ends(tmp_path: pathlib.Path):
  path = tmp_path / "vocab.txt"
  path.write_bytes(b"\r\n".join(t.encode() for t in [*_SPECIALS, "dog"]) + b"\r\n")
  assert Tokenizer.from_vocab(path).encode("Dog") == [4]


@pytest.mark.parametrize(
  ("text", "keep", "expected"),
  [
    ("a bad photo of a {}.", "{}", "a bad photo of a {}"),
    ("a Close-up   photo of_the {}!", "{}", "a closeup photo of the {}"),
    ("{}, or {{x}}", "{}", "{} or x"),
    ("Great White Shark, man-eater", ",", "great white shark, maneater"),
    ("  Saint_Bernard's  ", "", "saint bernards"),
    ("", ",", ""),
  ],
)
def test_canonicalise_text(text: str, keep: str, expected: str):
  assert canonicalise_text(text, keep) == expected


def test_truncation_keeps_all_tokens_that_fit(words: Tokenizer):
  """Truncation to MAX_CHARS never removes a token that would fit."""
  assert MAX_CHARS > 100 * 128
