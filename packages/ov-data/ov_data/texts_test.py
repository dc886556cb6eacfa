import io
import pathlib

import numpy as np
from PIL import Image
import pytest

from ov_data import example, records, texts
from ov_data.loader import Loader
from ov_data.sources import Source
from ov_data.texts import TextSpec
from ov_data.tokenizer import Tokenizer

_WORDS = "one two three four five six seven eight nine ten dog cat tree alt . !"
_ALT = TextSpec(("txt",), 8, append_cls=True)
_SENTENCE = TextSpec(("long",), 8, pick="sentence", append_cls=True, fallback=("txt",))
_WHOLE = TextSpec(("long",), 12, fallback=("txt",))
_OPENVISION = {"labels1": _ALT, "labels2": _SENTENCE, "caption": _WHOLE}


def _jpeg():
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8)).save(buffer, "JPEG")
  return buffer.getvalue()


def _write(folder: pathlib.Path, examples) -> Source:
  folder.mkdir(parents=True)
  framed = [records.frame(example.serialise({"jpg": _jpeg(), **e})) for e in examples]
  (folder / "0.tfrecord").write_bytes(b"".join(framed))
  return Source(str(folder), caption_keys=())


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train([_WORDS], 100, kind="words")


@pytest.fixture
def load(tokenizer):
  def batches(source, count, specs=_OPENVISION, **arguments):
    arguments = dict(image_size=8, batch_size=4, shuffle="none", threads=2) | arguments
    with Loader(source, tokenizer=tokenizer, texts=specs, **arguments) as loader:
      found = [next(loader) for _ in range(count)]
      return {k: sum(([*b[k]] for b in found), []) for k in found[0]}, loader

  return batches


@pytest.mark.parametrize(
  ("text", "sentences"),
  [
    ("A dog. A cat!! A tree?", ["A dog", " A cat", " A tree?"]),
    ("4.5 metres", ["4", "5 metres"]),
    ("...! .\n", []),
    ("no stop", ["no stop"]),
    ("a|b", ["a", "b"]),
    ("", []),
  ],
)
def test_split_sentences(text, sentences):
  assert texts.split_sentences(text) == sentences


def test_the_texts_of_openvision(load, tokenizer, tmp_path):
  source = _write(tmp_path / "d", [{"txt": "alt one", "long": "Two three. Four five! Six."}] * 4)
  rows, _ = load(source, 25)
  assert rows.keys() == {"image", "valid", "index", *_OPENVISION}
  for name, spec in _OPENVISION.items():
    assert np.asarray(rows[name]).shape == (100, spec.length)
    assert rows[name][0].dtype == np.int32
    assert all((row[-1] == tokenizer.cls_id) == spec.append_cls for row in rows[name])
  decoded = {name: tokenizer.decode_batch(np.asarray(rows[name])) for name in _OPENVISION}
  assert set(decoded["labels1"]) == {"alt one"}
  assert set(decoded["caption"]) == {"two three. four five! six."}
  counts = [decoded["labels2"].count(text) for text in ("two three", "four five", "six")]
  assert sum(counts) == 100
  np.testing.assert_allclose(counts, 100 / 3, atol=5 * (100 * 2 / 9) ** 0.5)


def test_rows_are_as_the_tokenizer_packs_them(load, tokenizer, tmp_path):
  source = _write(tmp_path / "d", [{"txt": "one " * 20, "long": "dog cat"}] * 4)
  rows, _ = load(source, 1)
  cls, (one,) = tokenizer.cls_id, tokenizer.encode("one")
  assert rows["labels1"][0].tolist() == [1, one, one, one, one, one, 2, cls]
  dog, cat = tokenizer.encode("dog cat")
  assert rows["labels2"][0].tolist() == [1, dog, cat, 2, 0, 0, 0, cls]
  assert rows["caption"][0].tolist() == [1, dog, cat, 2, *[0] * 8]


@pytest.mark.parametrize("long", ["", "  ", "..!", [], ["", "."], "\u00a0."])
def test_without_a_sentence_the_fallback_replaces_it(load, tokenizer, tmp_path, long):
  with_long = {"txt": "alt", "long": "dog"}  # makes the key known
  source = _write(tmp_path / "d", [with_long, *[{"txt": ["one", "two. three"], "long": long}] * 3])
  rows, _ = load(source, 20)
  alt, sentence, whole = (
    tokenizer.decode_batch(np.asarray(rows[name])) for name in ("labels1", "labels2", "caption")
  )
  drawn = [i for i in range(80) if i % 4]
  if long != "\u00a0.":  # contains a character, so it is a text
    assert all(alt[i] == sentence[i] == whole[i] for i in drawn)  # one sample for all three
    assert {alt[i] for i in drawn} == {"one", "two. three"}
  assert all(rows["valid"])


@pytest.mark.parametrize("text", ["...", "!", " | ", "?", "—", "🙂"])
@pytest.mark.parametrize("pick", ["whole", "sentence"])
def test_texts_of_punctuation_are_used_for_training(load, tokenizer, tmp_path, text, pick):
  # As in the released code, only long captions without a sentence are replaced.
  source = Source(_write(tmp_path / "d", [{"txt": text}] * 4).path)
  want, _ = tokenizer.encode_batch([text], 8)
  for specs in (None, {"ids": TextSpec(("txt",), 8, pick=pick)}):
    rows, loader = load(source, 1, specs=specs, text_len=8)
    assert all(rows["valid"]) and not loader.skipped
    np.testing.assert_array_equal(rows["ids"], np.repeat(want, 4, 0))


def test_only_texts_that_need_words_are_replaced(load, tokenizer, tmp_path):
  source = _write(tmp_path / "d", [{"txt": "...", "long": "dog"}] * 4)
  specs = {
    "kept": TextSpec(("txt",), 8, fallback=("long",), needs_words=False),
    "replaced": TextSpec(("txt",), 8, fallback=("long",)),
  }
  rows, _ = load(source, 1, specs=specs)
  for name, text in (("kept", "..."), ("replaced", "dog")):
    want, _ = tokenizer.encode_batch([text], 8)
    np.testing.assert_array_equal(rows[name], np.repeat(want, 4, 0))


def test_a_sentence_is_one_of_the_caption_that_was_sampled(load, tokenizer, tmp_path):
  captions = ["one two. one three", "four five! four six", "seven. seven eight"]
  source = _write(tmp_path / "d", [{"txt": "alt", "long": captions}] * 4)
  rows, _ = load(source, 25)
  sentence = tokenizer.decode_batch(np.asarray(rows["labels2"]))
  whole = tokenizer.decode_batch(np.asarray(rows["caption"]))
  assert all(w.startswith(s) or w.endswith(s) for s, w in zip(sentence, whole))
  assert len(set(sentence)) == 6 and len(set(whole)) == 3


def test_samples_under_other_keys_are_independent(load, tokenizer, tmp_path):
  two = {"txt": ["one", "two"], "long": ["one", "two"]}
  source = _write(tmp_path / "d", [two] * 4)
  rows, _ = load(source, 100)
  same = np.asarray(rows["labels1"]) == np.asarray(rows["labels2"])
  assert 140 < same[:, 1].sum() < 260  # of 400; 6 standard deviations


def test_samples_depend_on_seed_and_position_alone(load, tmp_path):
  captions = [f"{a} {b}." for a in ("one", "two", "three") for b in ("dog", "cat", "tree")]
  source = _write(tmp_path / "d", [{"txt": captions, "long": " ".join(captions)}] * 8)
  whole, _ = load(source, 6, seed=3)
  late, _ = load(source, 4, seed=3, position=8, threads=1, prefetch=0)
  half, _ = load(source, 6, seed=3, rows=slice(2, 4))
  other, _ = load(source, 6, seed=4)
  for name in _OPENVISION:
    np.testing.assert_array_equal(whole[name][8:], late[name])
    kept = [row for i, row in enumerate(whole[name]) if i % 4 >= 2]
    np.testing.assert_array_equal(kept, half[name])
  assert not np.array_equal(whole["labels2"], other["labels2"])


def test_first_takes_the_first_sentence_of_the_first_text(load, tokenizer, tmp_path):
  source = _write(tmp_path / "d", [{"txt": ["one", "two"], "long": ["three. four", "five"]}] * 4)
  rows, _ = load(source, 1, captions="first")
  found = {name: set(tokenizer.decode_batch(np.asarray(rows[name]))) for name in _OPENVISION}
  assert found == {"labels1": {"one"}, "labels2": {"three"}, "caption": {"three. four"}}


def test_a_record_without_text_keeps_its_row(load, tmp_path):
  good = {"txt": "alt", "long": "one"}
  source = _write(tmp_path / "d", [good, {"label": 1}, good, {"txt": b"\xff\xfe caf\xe9"}])
  rows, loader = load(source, 1, max_bad_fraction=0.5)
  assert rows["valid"] == [True, False, True, True]  # invalid UTF-8 is still a text
  assert loader.skipped == {"no text under txt": 1}
  assert all(not rows[name][1].any() for name in _OPENVISION)


def test_no_texts(load, tmp_path):
  source = _write(tmp_path / "d", [{"label": n} for n in range(4)])
  rows, _ = load(Source(source.path), 1, specs={}, extra_keys=("label",))  # txt is not required
  assert rows.keys() == {"image", "valid", "index", "label"}
  assert all(rows["valid"]) and rows["label"] == [0, 1, 2, 3]


@pytest.mark.parametrize("specs", [None, {"labels1": _ALT}])
def test_all_captions(tokenizer, tmp_path, specs):
  many = [{"txt": ["one", "", "two."], "long": ["three"] * n} for n in range(5)]
  path = _write(tmp_path / "d", [*many, {"long": "  "}]).path
  with Loader.evaluation(
    Source(path, caption_keys=("txt", "long")),
    image_size=8, batch_size=4, tokenizer=tokenizer, text_len=8, texts=specs, captions="all",
    max_bad_fraction=0.5,
  ) as loader:  # fmt: skip
    batches = list(loader)
  captions = sum((batch["captions"] for batch in batches), [])
  assert captions[:5] == [["one", "two.", *["three"] * n] for n in range(5)]
  assert captions[5:] == [[], [], []]  # bad record, and padding after the end
  assert np.concatenate([b["valid"] for b in batches]).tolist() == [True] * 5 + [False] * 3
  ids = batches[0]["ids" if specs is None else "labels1"]
  assert tokenizer.decode_batch(ids) == ["one"] * 4
  assert ("ids" in batches[0]) == (specs is None)


def test_misspelt_keys_fail_at_once(load, tmp_path):
  source = _write(tmp_path / "a", [{"txt": "one", "long": "two"}])
  for spec in (TextSpec(("text",), 8), TextSpec(("txt",), 8, fallback=("text",))):
    with pytest.raises(ValueError, match="'alt' reads feature 'text', .* have jpg, long, txt"):
      load(source, 1, specs={"alt": spec})


def test_a_mixture_may_name_its_texts_differently(load, tokenizer, tmp_path):
  mixture = [_write(tmp_path / "a", [{"txt": "one"}]), _write(tmp_path / "b", [{"alt": "two"}])]
  rows, _ = load(mixture, 2, specs={"text": TextSpec(("txt", "alt"), 5)})
  assert set(tokenizer.decode_batch(np.asarray(rows["text"]))) == {"one", "two"}
  mixture.append(_write(tmp_path / "c", [{"label": 1}]))
  with pytest.raises(ValueError, match=r"'text' reads txt, alt, and .*/c have none of them"):
    load(mixture, 1, specs={"text": TextSpec(("txt", "alt"), 5)})


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(keys=()), r"keys=\(\)"),
    (dict(keys="txt"), "expected a tuple"),
    (dict(fallback="txt"), "expected a tuple"),
    (dict(pick="half"), "pick='half'"),
    (dict(length=1), "length=1: the special tokens need 2"),
    (dict(length=2, append_cls=True), "length=2: the special tokens need 3"),
  ],
)
def test_spec_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    TextSpec(**{"keys": ("txt",), "length": 8, **arguments})


def test_argument_errors(load, tmp_path):
  source = _write(tmp_path / "d", [{"txt": "one"}])
  with pytest.raises(ValueError, match="texts: image are reserved names of the batch"):
    load(source, 1, specs={"image": _ALT})
  with pytest.raises(ValueError, match="extra_keys: alt are reserved names of the batch"):
    load(source, 1, specs={"alt": _ALT}, extra_keys=("alt",))
