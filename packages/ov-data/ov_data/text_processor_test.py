"""Text processor: golden ids, saved folders, and invalid settings."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
from PIL import Image
import pytest

from ov_data import example, records, tokenizer_folder
from ov_data.loader import Loader
from ov_data.sources import Source
from ov_data.text_processor import TextProcessor
from ov_data.texts import TextSpec
from ov_data.tokenizer import Tokenizer

_GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "testdata" / "tokens.json").read_text("utf-8")
)
_VOCABULARY = "bert_base_vocab_bos_eos.txt"


def _jpeg() -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8)).save(buffer, "JPEG")
  return buffer.getvalue()


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
  """Vocabulary of the golden ids, which cannot be distributed with this repository."""
  places = [os.environ["OV_GOLDEN"]] if os.environ.get("OV_GOLDEN") else []
  places += [str(p / "shared" / "golden") for p in pathlib.Path(__file__).absolute().parents]
  for place in places:
    if (path := pathlib.Path(place) / _VOCABULARY).is_file():
      return Tokenizer.from_vocab(path)
  pytest.skip(f"SKIPPED: {_VOCABULARY} not found; set OV_GOLDEN to the folder that holds it")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
  return Tokenizer.train(["a photo of a large red circle, handheld greatwhite shark"], 100)


def test_golden_ids(bert: Tokenizer):
  """Ids equal those of evaluation and training in the released OpenVision code."""
  ids = TextProcessor(bert, 80).encode([golden["text"] for golden in _GOLDEN])
  assert ids.dtype == np.int32
  for row, golden in zip(ids.tolist(), _GOLDEN, strict=True):
    assert row == golden["eval_80"] == golden["openvision1_labels1_80"]


def test_golden_rows_of_training(bert: Tokenizer, tmp_path: pathlib.Path):
  """Loader targets and masks equal those of the released OpenVision code."""
  texts = [golden["text"] for golden in _GOLDEN if golden["text"].strip()]
  framed = [records.frame(example.serialise({"jpg": _jpeg(), "txt": t, "long": t})) for t in texts]
  (tmp_path / "0.tfrecord").write_bytes(b"".join(framed))
  specs = {
    "labels1": TextSpec(("txt",), 80, append_cls=True),
    "caption": TextSpec(("long",), 128, fallback=("txt",)),
  }
  with Loader.evaluation(
    Source(str(tmp_path)), image_size=4, batch_size=len(texts), tokenizer=bert, texts=specs
  ) as loader:
    batch = next(iter(loader))
  assert batch["valid"].all(), loader.skipped
  processor = TextProcessor(bert, 80)
  np.testing.assert_array_equal(batch["labels1"], processor.encode(texts))
  target = np.pad(batch["caption"][:, 1:], ((0, 0), (0, 1)))
  golden = [golden for golden in _GOLDEN if golden["text"].strip()]
  for row, mask, expected in zip(target, target != bert.pad_id, golden, strict=True):
    assert row.tolist() == expected["openvision1_autoreg_labels_128"]
    assert mask.astype(int).tolist() == expected["openvision1_cap_loss_mask_128"]


def test_prompts_are_canonicalized_and_captions_are_not(bert: Tokenizer):
  processor = TextProcessor(bert, 16)
  prompt = ["a Close-up   photo of_the Great White Shark, man-eater."]
  plain = ["a closeup photo of the great white shark, maneater"]
  np.testing.assert_array_equal(processor.encode_prompts(prompt), processor.encode(plain))
  assert not np.array_equal(processor.encode(prompt), processor.encode(plain))
  as_it_is = dataclasses.replace(processor, canonical=False)
  np.testing.assert_array_equal(as_it_is.encode_prompts(prompt), processor.encode(prompt))


def test_decode_inverts_encode(words: Tokenizer):
  processor = TextProcessor(words, 20)
  texts = ["a large red circle", "", "shark"]
  assert processor.decode(processor.encode(texts)) == texts
  assert processor.encode([]).shape == (0, 20)


@pytest.mark.parametrize(
  "settings",
  [
    {},
    dict(length=32, append_cls=False, pool="mean", padding="attend", canonical=False),
    dict(length=8, append_cls=True, pool="map"),
  ],
)
def test_save_and_load(words: Tokenizer, tmp_path: pathlib.Path, settings):
  processor = TextProcessor(words, **settings)
  processor.save(tmp_path)
  loaded = TextProcessor.load(tmp_path)
  for field in dataclasses.fields(TextProcessor):
    if field.name != "tokenizer":
      assert getattr(loaded, field.name) == getattr(processor, field.name)
  assert loaded.fingerprint == processor.fingerprint
  texts = ["a photo of a Shark!", "large circle " * 50]
  np.testing.assert_array_equal(loaded.encode(texts), processor.encode(texts))
  np.testing.assert_array_equal(loaded.encode_prompts(texts), processor.encode_prompts(texts))
  assert Tokenizer.load(tmp_path).fingerprint == words.fingerprint
  names = ["packing.json", "text_processor.json", "tokenizer.json"]
  assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_tokenizers_own_cls_does_not_affect_ids(words: Tokenizer, tmp_path: pathlib.Path):
  words.save(tmp_path)
  own = Tokenizer.from_file(tmp_path / "tokenizer.json", append_cls=True)
  for append_cls, pool in ((True, "last"), (False, "mean")):
    one, other = (TextProcessor(t, 12, append_cls, pool) for t in (words, own))
    np.testing.assert_array_equal(one.encode(["a red circle"]), other.encode(["a red circle"]))


def test_fingerprint_depends_on_every_setting(words: Tokenizer):
  base = TextProcessor(words, 20)
  changes = [
    dict(length=21),
    dict(append_cls=False, pool="mean"),
    dict(pool="mean"),
    dict(padding="attend"),
    dict(canonical=False),
    dict(tokenizer=Tokenizer.train(["a b c"], 20)),
  ]
  prints = {dataclasses.replace(base, **change).fingerprint for change in changes}
  assert len(prints | {base.fingerprint}) == len(changes) + 1
  assert pickle.loads(pickle.dumps(base)).fingerprint == base.fingerprint


def _change(folder: pathlib.Path, name: str, **values) -> None:
  """Change values and seal the file again, so that its checksum is valid."""
  content = json.loads((folder / name).read_text("utf-8"))
  content.pop("sha256")
  (folder / name).write_bytes(tokenizer_folder.seal(content | values))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(length=20), "no longer reproduces its golden ids"),
    (dict(append_cls=False, pool="mean"), "no longer reproduces"),
    (dict(canonical=False), "no longer reproduces.*itap|no longer reproduces.*bad photo"),
    (dict(format=3), "has format 3, but this version of ov_data supports formats up to 2"),
    (dict(format="2"), "is damaged: its format is '2'"),
    (dict(golden=[{"text": "a"}]), "is damaged: KeyError"),
    (dict(golden={"a": [1]}), "is damaged: .*expected a list"),
    (dict(golden_prompts=[["a", [1]]]), "is damaged: .*expected a text and a list of ids"),
    (dict(pool="best"), r"text_processor\.json: pool='best'"),
    (dict(pool=["last"]), r"pool=\['last'\]: expected one of"),
    (dict(length=2**31), "length=2147483648: expected an integer of at most 1,048,576"),
    (dict(length=24.0), "length=24.0: expected an integer"),
    (dict(canonical="no"), "canonical='no': expected True or False"),
    (dict(tokenizer_sha256="0"), "belongs to another tokenizer.json"),
  ],
)
def test_load_rejects_a_changed_folder(words: Tokenizer, tmp_path: pathlib.Path, change, message):
  TextProcessor(words, 24).save(tmp_path)
  _change(tmp_path, "text_processor.json", **change)
  with pytest.raises(ValueError, match=message):
    TextProcessor.load(tmp_path)


def test_load_rejects_the_tokenizer_of_another_run(words: Tokenizer, tmp_path: pathlib.Path):
  TextProcessor(words).save(tmp_path / "a")
  other = Tokenizer.train(["a photo of a large red circle, handheld sharks and zebras"], 100)
  TextProcessor(other).save(tmp_path / "b")
  for name in ("tokenizer.json", "packing.json"):  # consistent with each other
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
  with pytest.raises(ValueError, match=r"another tokenizer\.json .* Copy both from the same run"):
    TextProcessor.load(tmp_path / "a")


def test_load_names_missing_or_damaged_files(words: Tokenizer, tmp_path: pathlib.Path):
  with pytest.raises(FileNotFoundError, match=r"packing\.json is missing"):
    TextProcessor.load(tmp_path / "nowhere")
  words.save(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"holds a tokenizer, but not text_processor\.json"):
    TextProcessor.load(tmp_path)
  for content in (b"{", b"[]", b"\xff\xfe", b'{"format": "x"}', b"null"):
    (tmp_path / "text_processor.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"text_processor\.json is damaged"):
      TextProcessor.load(tmp_path)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(pool="cls"), "pool='cls': expected one of last, first, argmax, mean, map"),
    (dict(padding="none"), "padding='none': expected one of attend, mask"),
    (dict(append_cls=False), "pool='last' reads the last column.*append_cls=True"),
    (dict(length=2), "length=2 is too short"),
    (dict(pool="argmax"), r"largest id, which should be \[eos\]; here that is id 2 of 0 to"),
  ],
)
def test_impossible_settings(words: Tokenizer, settings, message):
  with pytest.raises(ValueError, match=message):
    TextProcessor(words, **settings)


def test_argmax_finds_an_end_token_of_the_largest_id(tmp_path: pathlib.Path):
  path = tmp_path / "vocab.txt"
  path.write_text("[PAD]\n[UNK]\na\nb\n[bos]\n[eos]\n")
  processor = TextProcessor(Tokenizer.from_vocab(path), 6, append_cls=False, pool="argmax")
  assert processor.encode(["a", "a b a b a b"]).argmax(axis=1).tolist() == [2, 5]
  with pytest.raises(ValueError, match=r"append_cls: no \[CLS\]"):
    TextProcessor(processor.tokenizer, 6)
