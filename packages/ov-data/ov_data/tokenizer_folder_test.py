"""Tokenizer folders: detection of changes and interrupted saves, and older formats."""

import json
import os
import pathlib

import pytest

from ov_data import tokenizer_folder
from ov_data.text_processor import TextProcessor
from ov_data.tokenizer import Tokenizer

_CAPTIONS = ["a large red striped circle above a small blue solid square", "zebra giraffe"]
_FILES = ("tokenizer.json", "packing.json", "text_processor.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return Tokenizer.train(_CAPTIONS, 60, kind="words")


@pytest.mark.parametrize("name", _FILES)
def test_any_changed_byte_is_detected(tokenizer: Tokenizer, tmp_path: pathlib.Path, name: str):
  TextProcessor(tokenizer, 24).save(tmp_path)
  file = tmp_path / name
  data = file.read_bytes()
  step = max(1, len(data) // 150)
  for i in [*range(0, len(data), step), len(data) - 1]:
    for bit in (0, 5):
      file.write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
      with pytest.raises(ValueError) as error:
        TextProcessor.load(tmp_path)
      assert name in str(error.value) and "\n" not in str(error.value)
  for changed in (data[:-1], data + b" ", b"\xef\xbb\xbf" + data, b""):
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=name):
      TextProcessor.load(tmp_path)
  file.write_bytes(data)
  assert TextProcessor.load(tmp_path).tokenizer.fingerprint == tokenizer.fingerprint


def test_every_byte_of_the_seal_counts(tokenizer: Tokenizer, tmp_path: pathlib.Path):
  tokenizer.save(tmp_path)
  file = tmp_path / "packing.json"
  data = file.read_bytes()
  for i in range(120):  # covers format and seal
    for other in b'0123"x F':
      if data[i] != other:
        file.write_bytes(data[:i] + bytes([other]) + data[i + 1 :])
        with pytest.raises(ValueError, match=r"packing\.json"):
          Tokenizer.load(tmp_path)


def _swap_words(folder: pathlib.Path) -> None:
  """Swap the ids of two words that are in no golden text."""
  file = folder / "tokenizer.json"
  content = json.loads(file.read_text("utf-8"))
  vocabulary = content["model"]["vocab"]
  vocabulary["zebra"], vocabulary["giraffe"] = vocabulary["giraffe"], vocabulary["zebra"]
  file.write_text(json.dumps(content), "utf-8")


def _of_format_1(folder: pathlib.Path, *drop: str) -> None:
  file = folder / "packing.json"
  content = json.loads(file.read_text("utf-8")) | {"format": 1}
  for key in ("sha256", "tokenizer_sha256", *drop):
    del content[key]
  file.write_text(json.dumps(content), "utf-8")


def test_another_tokenizer_json_is_rejected(tokenizer: Tokenizer, tmp_path: pathlib.Path):
  tokenizer.save(tmp_path)
  _swap_words(tmp_path)
  message = r"tokenizer\.json was modified or replaced after packing\.json.*Copy both files from"
  with pytest.raises(ValueError, match=message):
    Tokenizer.load(tmp_path)


def test_folders_without_checksums_load(tokenizer: Tokenizer, tmp_path: pathlib.Path):
  tokenizer.save(tmp_path)
  _of_format_1(tmp_path)
  assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
  _swap_words(tmp_path)
  with pytest.raises(ValueError, match=r"has fingerprint .* but packing\.json says"):
    Tokenizer.load(tmp_path)
  _of_format_1_without_fingerprint(tmp_path)
  Tokenizer.load(tmp_path)  # without seal, only golden ids are compared
  content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
  content["normalizer"] = None
  (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
  with pytest.raises(ValueError, match="no longer reproduces its golden ids.*was .* is "):
    Tokenizer.load(tmp_path)


def _of_format_1_without_fingerprint(folder: pathlib.Path) -> None:
  file = folder / "packing.json"
  content = json.loads(file.read_text("utf-8"))
  del content["fingerprint"], content["format"]
  file.write_text(json.dumps(content), "utf-8")


def test_another_library_version_may_write_other_json(tokenizer: Tokenizer, tmp_path: pathlib.Path):
  tokenizer.save(tmp_path)
  _of_format_1(tmp_path)
  file = tmp_path / "packing.json"
  content = json.loads(file.read_text("utf-8"))
  file.write_text(json.dumps(content | {"fingerprint": "0" * 16, "tokenizers_version": "0.1"}))
  assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(golden_length=10**30), "golden_length 1000000000"),
    (dict(golden_length="24"), "is damaged"),
    (dict(append_cls="yes"), "append_cls is 'yes'"),
    (dict(golden={"a": 1}), "expected a list"),
    (dict(golden=[{"text": "a", "ids": 1}]), "expected a text and a list of ids"),
    (dict(golden=[{"text": "a"}] * 101), "at most 100"),
    (dict(format=[1]), "its format is"),
    (dict(format=3), "has format 3, but this version of ov_data supports formats up to 2"),
  ],
)
def test_wrong_values_give_one_line_errors(tokenizer: Tokenizer, tmp_path, change, message):
  tokenizer.save(tmp_path)
  file = tmp_path / "packing.json"
  content = json.loads(file.read_text("utf-8"))
  del content["sha256"]
  file.write_bytes(tokenizer_folder.seal(content | change))
  with pytest.raises(ValueError, match=message) as error:
    Tokenizer.load(tmp_path)
  assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"{}", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b""])
def test_files_of_other_shapes_are_damaged(tokenizer: Tokenizer, tmp_path, data):
  TextProcessor(tokenizer, 24).save(tmp_path)
  for name in ("text_processor.json", "packing.json"):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
      TextProcessor.load(tmp_path)


def test_incomplete_folders_are_detected(tokenizer: Tokenizer, tmp_path: pathlib.Path):
  assert not Tokenizer.is_complete(tmp_path / "none")
  TextProcessor(tokenizer, 24).save(tmp_path / "a")
  assert Tokenizer.is_complete(tmp_path / "a") and TextProcessor.is_complete(tmp_path / "a")
  for name in ("text_processor.json", "packing.json"):
    (tmp_path / "a" / name).unlink()
    assert not TextProcessor.is_complete(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=name):
      TextProcessor.load(tmp_path / "a")
  with pytest.raises(
    FileNotFoundError, match="saving it was interrupted; save the tokenizer again"
  ):
    Tokenizer.load(tmp_path / "a")


class _Killed(BaseException):
  pass


def _kill_at(monkeypatch, number: int) -> None:
  """Make all file changes from the given number on fail."""
  done = 0

  def counted(change):
    def inner(*args, **kwargs):
      nonlocal done
      done += 1
      if done > number:
        raise _Killed
      return change(*args, **kwargs)

    return inner

  monkeypatch.setattr(tokenizer_folder, "_write", counted(tokenizer_folder._write))
  for name in ("mkdir", "rename", "replace", "unlink"):
    monkeypatch.setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
  # A killed process does not clean up.
  monkeypatch.setattr(tokenizer_folder.shutil, "rmtree", lambda *args, **kwargs: None)


@pytest.mark.parametrize("before", ["nothing", "same tokenizer", "other tokenizer"])
def test_a_killed_save_leaves_a_complete_folder_or_a_detectable_one(
  tokenizer: Tokenizer, tmp_path: pathlib.Path, before: str
):
  new = TextProcessor(tokenizer, 24)
  other = TextProcessor(Tokenizer.train(["entirely other words"], 40), 30)
  states = set()
  for number in range(40):
    folder = tmp_path / str(number) / "tokenizer"
    if before == "same tokenizer":
      tokenizer.save(folder)
    elif before == "other tokenizer":
      other.save(folder)
    with pytest.MonkeyPatch.context() as patch:
      _kill_at(patch, number)
      try:
        new.save(folder)
        done = True
      except _Killed:
        done = False
    if Tokenizer.is_complete(folder):
      kept = Tokenizer.load(folder).fingerprint
      assert kept in (tokenizer.fingerprint, other.tokenizer.fingerprint)
      if TextProcessor.is_complete(folder):
        states.add(TextProcessor.load(folder).length)
      else:
        assert kept == tokenizer.fingerprint
    else:
      states.add("incomplete")
      assert before != "same tokenizer"
    new.save(folder)  # the next save succeeds and cleans up
    assert TextProcessor.load(folder).fingerprint == new.fingerprint
    assert os.listdir(folder.parent) == ["tokenizer"] and len(os.listdir(folder)) == 3
    if done:
      break
  assert done and number > 2
  expected = {"nothing": {24, "incomplete"}, "same tokenizer": {24}}
  assert states == expected.get(before, {24, 30, "incomplete"})


def test_a_save_never_follows_a_planted_link(tokenizer: Tokenizer, tmp_path: pathlib.Path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  folder = tmp_path / "tokenizer"
  folder.mkdir()
  for name in _FILES:
    (folder / f".{name}.partial").symlink_to(victim)
  TextProcessor(tokenizer, 24).save(folder)
  assert victim.read_text() == "precious" and TextProcessor.is_complete(folder)
