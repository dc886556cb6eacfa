"""Malformed and oversized tokenizer.json files raise one-line errors."""

import json
import pathlib

import pytest

from ov_data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def content() -> dict:
  return json.loads(Tokenizer.train(["a red dog", "two cats"], 40).to_json())


def _without(content: dict, *path: str) -> dict:
  copy = json.loads(json.dumps(content))
  inner = copy
  for key in path[:-1]:
    inner = inner[key]
  del inner[path[-1]]
  return copy


def _with(content: dict, value: object, *path: str) -> dict:
  copy = json.loads(json.dumps(content))
  inner = copy
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return copy


def _refused(path: pathlib.Path, data: str | bytes, message: str) -> None:
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  with pytest.raises(ValueError, match=message) as error:
    Tokenizer.from_file(path)
  text = str(error.value)
  assert str(path) in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize(
  ("number", "message"),
  [
    (2**31, "the id of 'dog' is 2147483648; expected 0 to 9,999,999"),
    (10**7, "the id of 'dog' is 10000000; expected"),
    (10**30, "the id of 'dog' is a number with more than 18 digits"),
    (-1, "the id of 'dog' is -1"),
    (5.0, "the id of 'dog' is of type float; expected a number"),
    (True, "of type bool"),
    ("5", "of type str"),
    (None, "of type NoneType"),
    ([5], "of type list"),
    (1, "both have id 1; expected one"),
  ],
)
def test_ids_are_checked_before_the_library_reads_them(content, tmp_path, number, message):
  changed = _with(content, number, "model", "vocab", "dog")
  _refused(tmp_path / "tokenizer.json", json.dumps(changed), message)
  if number != 1:
    token = {"id": number, "content": "dog", "special": False, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    changed = _with(content, [token], "added_tokens")
    _refused(tmp_path / "tokenizer.json", json.dumps(changed), message)


def test_other_shapes_give_one_line_errors(content, tmp_path):
  path = tmp_path / "tokenizer.json"
  for value in (None, [], "x", 3, True):
    _refused(path, json.dumps(value), "is not a tokenizer.json: expected a JSON object")
    _refused(path, json.dumps(_with(content, value, "model")), "an object under 'model'")
  for value in (None, "x", 3):
    _refused(path, json.dumps(_with(content, value, "model", "vocab")), "under 'vocab'")
  for value in ({"a": 1}, "x", 3, [3], [{}], [{"content": 3, "id": 1}]):
    _refused(path, json.dumps(_with(content, value, "added_tokens")), "added_tokens")
  for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
    for value in ([], 3, {"type": "None of these"}):
      _refused(path, json.dumps(_with(content, value, key)), "is not a tokenizer.json")
  _refused(path, json.dumps(_without(content, "model", "vocab")), "under 'vocab'")
  _refused(path, "[" * 200_000, "nested too deeply")
  _refused(path, '{"model": ' + "[" * 200_000, "nested too deeply")
  _refused(path, b'{"a": "\xe9"}', "byte 7 is not UTF-8")
  _refused(path, "{", "is not a tokenizer.json")
  _refused(path, '{"model": ' + "9" * 5000 + "}", "is not a tokenizer.json")


def test_a_file_that_cannot_encode_is_rejected(content, tmp_path):
  changed = _with(content, "[none]", "model", "unk_token")
  _refused(
    tmp_path / "tokenizer.json", json.dumps(changed), "is not a tokenizer.json: WordPiece error"
  )


def test_vocabularies_as_lists_are_read(tmp_path):
  names = ["<pad>", "<s>", "</s>", "<unk>", "a", "b"]
  model = {"type": "Unigram", "unk_id": 3, "vocab": [[name, -1.0] for name in names]}
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps({"version": "1.0", "model": model}))
  tokenizer = Tokenizer.from_file(path)
  assert tokenizer.vocab_size == 6 and tokenizer.encode("ab") == [4, 5]
  for bad in ([["a"]], [[1, 2]], ["a"], [["a", "b"]]):
    changed = {"version": "1.0", "model": {**model, "vocab": bad}}
    _refused(path, json.dumps(changed), "is not a tokenizer.json")
