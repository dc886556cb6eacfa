"""Resuming: only valid shards of the same recipe are reused."""

from collections.abc import Callable, Iterator
import dataclasses
import json
import os
from pathlib import Path

import pytest

from ov_data import index, sources, unfinished, writer


@dataclasses.dataclass(frozen=True)
class _Texts:
  """Three examples per shard; fails at one shard and records the written shards."""

  text: str = "a"
  fail: int = -1
  made: str = ""

  def __call__(self, split: str, number: int) -> Iterator[writer.Features | writer.Skip]:
    if number == self.fail:
      raise RuntimeError("stop")
    if self.made:
      with open(self.made, "a") as file:
        file.write(f"{number}\n")
    for i in range(3):
      yield {"txt": f"{self.text} {number} {i}"}
    yield writer.Skip(f"{number}", "left out")


def _write(path: Path, texts: _Texts, **arguments: object) -> writer.Summary:
  return writer.write_dataset(
    path, {"train": 4}, texts, {"text": texts.text}, workers=0, **arguments
  )


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
  """Interrupted data set with three of four shards."""
  with pytest.raises(RuntimeError):
    _write(tmp_path / "d", _Texts(fail=3))
  return tmp_path / "d"


def _texts(path: Path) -> list[str]:
  data = sources.Dataset(sources.Source(str(path), "train"))
  return [data.read(i).texts["txt"][0].decode() for i in range(len(data))]


_EXPECTED = [f"a {number} {i}" for number in range(4) for i in range(3)]


def _resume(path: Path) -> list[str]:
  """Resume, check the result, and return the written shards."""
  made = path.parent / "made"
  summary = _write(path, _Texts(made=str(made)))
  assert summary.examples == {"train": 12} and summary.skipped == {"left out": 4}
  assert _texts(path) == _EXPECTED
  content = json.loads((path / "dataset.json").read_text())
  assert content["splits"]["train"]["records"] == [3] * 4
  assert not (path / unfinished.FOLDER).exists()
  return made.read_text().split()


def test_only_missing_shards_are_written(stopped):
  assert _resume(stopped) == ["3"]


def _log(path: Path) -> Path:
  return path / unfinished.FOLDER / "train-00001-of-00004.tfrecord.json"


@pytest.mark.parametrize(
  "change",
  [
    lambda data: data.replace(b'"examples": 3', b'"examples": 4'),
    lambda data: data.replace(b"left out", b"left 0ut"),
    lambda data: data[:-9],
    lambda data: b"",
    lambda data: b"[" * 99_999,
    lambda data: b"{}",
    lambda data: b"[1, 2]",
    lambda data: b"[null, {}]",
    lambda data: b"7" * 9999,
    lambda data: b"\xff\xfe",
    lambda data: data.replace(b'"recipe": "', b'"recipe": "0'),
  ],
)
def test_a_damaged_log_rewrites_its_shard(stopped: Path, change: Callable[[bytes], bytes], caplog):
  log = _log(stopped)
  log.write_bytes(change(log.read_bytes()))
  assert _resume(stopped) == ["1", "3"]
  assert "train-00001-of-00004.tfrecord is written again" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("nowhere", p)])
def test_a_log_that_is_not_a_regular_file(stopped: Path, make: Callable[[Path], None]):
  _log(stopped).unlink()
  make(_log(stopped))
  if _log(stopped).is_dir():
    with pytest.raises(IsADirectoryError):  # one-line error with the name
      _resume(stopped)
  else:
    assert _resume(stopped) == ["1", "3"]


@pytest.mark.parametrize(
  "change",
  [
    lambda data: b"",
    lambda data: data[:-70],
    lambda data: bytes([data[0] ^ 1]) + data[1:],
    lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    lambda data: data + data[:70],
  ],
)
def test_a_shard_that_changed_is_written_again(
  stopped: Path, change: Callable[[bytes], bytes], caplog
):
  shard = stopped / "train-00001-of-00004.tfrecord"
  damaged = change(shard.read_bytes())
  shard.write_bytes(damaged)
  (stopped / f"{shard.name}.damaged").write_bytes(b"set aside by an earlier run")
  assert _resume(stopped) == ["1", "3"]
  assert (stopped / f"{shard.name}.2.damaged").read_bytes() == damaged
  assert (stopped / f"{shard.name}.damaged").read_bytes() == b"set aside by an earlier run"
  assert (
    f"{shard} is written again: its bytes have changed; the damaged file is kept" in caplog.text
  )


def test_every_byte_of_a_finished_shard_is_verified(tmp_path: Path):
  """The damage is in bytes not covered by the fingerprint in the sidecar."""
  with pytest.raises(RuntimeError):
    _write(tmp_path / "d", _Texts("long " * 40_000, fail=2))
  shard = tmp_path / "d" / "train-00001-of-00004.tfrecord"
  whole = shard.read_bytes()
  with shard.open("r+b") as file:
    file.seek(len(whole) // 2)
    file.write(bytes([whole[len(whole) // 2] ^ 1]))
  summary = _write(tmp_path / "d", _Texts("long " * 40_000))
  assert summary.resumed == 1 and summary.damaged == (shard.name,)
  assert "1 damaged shards written again (train-00001-of-00004.tfrecord)" in str(summary)
  assert shard.read_bytes() == whole
  assert not sources.Dataset(sources.Source(str(tmp_path / "d"), "train")).skips


def test_a_sidecar_of_a_damaged_shard_is_not_used_for_the_new_one(tmp_path: Path):
  with pytest.raises(RuntimeError):
    _write(tmp_path / "d", _Texts("long " * 40_000, fail=1))
  shard = tmp_path / "d" / "train-00000-of-00004.tfrecord"
  with shard.open("r+b") as file:
    file.seek(300_000)
    file.write(b"?")
  Path(f"{shard}.ovidx").unlink()
  assert index.load_index(str(shard)).damage  # size and edges equal those of the new shard
  assert _write(tmp_path / "d", _Texts("long " * 40_000)).damaged == (shard.name,)
  assert not index.load_index(str(shard)).damage


def test_damage_of_a_complete_data_set_is_detected_by_the_same_command(tmp_path: Path):
  _write(tmp_path / "d", _Texts("long " * 40_000))
  shard = tmp_path / "d" / "train-00002-of-00004.tfrecord"
  with shard.open("r+b") as file:
    file.seek(300_000)
    file.write(b"?")
  with pytest.raises(ValueError, match=f"now 1 of its shards are damaged: {shard.name}. Copy the"):
    _write(tmp_path / "d", _Texts("long " * 40_000))


def test_temporary_files_of_a_killed_writer_are_removed(tmp_path: Path):
  _write(tmp_path / "d", _Texts())
  before = sorted(os.listdir(tmp_path / "d"))
  (tmp_path / "d" / unfinished.FOLDER).mkdir()
  (tmp_path / "d" / unfinished.FOLDER / "recipe.json").write_text("{}")
  (tmp_path / "d" / "dataset.lock").write_text("")
  assert _write(tmp_path / "d", _Texts()).resumed == 4
  assert sorted(os.listdir(tmp_path / "d")) == before


def test_a_finished_shard_that_is_missing_is_counted(stopped: Path, caplog):
  (stopped / "train-00001-of-00004.tfrecord").unlink()
  assert _write(stopped, _Texts()).damaged == ("train-00001-of-00004.tfrecord",)
  assert "train-00001-of-00004.tfrecord is written again: it is missing" in caplog.text
  assert _texts(stopped) == _EXPECTED


def test_shards_of_two_recipes_are_never_mixed(stopped: Path):
  with pytest.raises(ValueError, match="contains another data set: text was a, now b"):
    _write(stopped, _Texts("b"))
  _write(stopped, _Texts("b"), overwrite=True)
  assert _texts(stopped) == [text.replace("a", "b") for text in _EXPECTED]


def test_logs_of_another_recipe_are_not_used(stopped: Path):
  """A copied log may belong to shards with other content."""
  log = _log(stopped).read_bytes()
  with pytest.raises(RuntimeError):
    _write(stopped, _Texts("b", fail=1), overwrite=True)
  _log(stopped).write_bytes(log)
  (stopped / "train-00001-of-00004.tfrecord").write_bytes(b"old")
  assert _write(stopped, _Texts("b")).resumed == 1
  assert _texts(stopped) == [text.replace("a", "b") for text in _EXPECTED]


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"[" * 99_999, b""])
def test_a_damaged_recipe_can_be_replaced(stopped: Path, content: bytes):
  (stopped / unfinished.FOLDER / "recipe.json").write_bytes(content)
  with pytest.raises(ValueError, match="with overwrite"):
    _write(stopped, _Texts())
  assert _write(stopped, _Texts(), overwrite=True).resumed == 0
  assert _texts(stopped) == _EXPECTED


@pytest.mark.parametrize(
  "lose", [Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.open("ab").write(b"x")]
)
def test_a_complete_data_set_that_lost_a_shard(tmp_path: Path, lose: Callable[[Path], object]):
  path = tmp_path / "d"
  _write(path, _Texts())
  lose(path / "train-00002-of-00004.tfrecord")
  with pytest.raises(ValueError, match="was complete, but now .*Copy the shards again, or replace"):
    _write(path, _Texts())
  assert _write(path, _Texts(), overwrite=True).resumed == 0
  assert _texts(path) == _EXPECTED


def test_any_changed_digit_of_a_manifest_is_detected(tmp_path: Path):
  path = tmp_path / "d"
  _write(path, _Texts())
  text = (path / "dataset.json").read_text()
  for old, new in (
    ('"examples": 12', '"examples": 13'),
    ("records", "recoRds"),
    ("bytes", "byteS"),
  ):
    (path / "dataset.json").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"dataset\.json is damaged \(checksum\)"):
      sources.Dataset(sources.Source(str(path), "train"))


@pytest.mark.parametrize("change", [("examples", "x"), ("fingerprint", 5), ("shards", None)])
def test_a_complete_data_set_with_a_damaged_manifest(tmp_path: Path, change: tuple[str, object]):
  path = tmp_path / "d"
  _write(path, _Texts())
  content = json.loads((path / "dataset.json").read_text())
  content["splits"]["train"][change[0]] = change[1]
  (path / "dataset.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="was complete, but now"):
    _write(path, _Texts())


def test_names_that_are_not_utf8_reach_the_list_of_skipped_inputs(tmp_path: Path):
  name = os.fsdecode(b"caf\xe9.jpg")
  path = tmp_path / os.fsdecode(b"d\xe9")

  def make(split: str, number: int) -> Iterator[writer.Features | writer.Skip]:
    yield {"key": name, "txt": "ä"}
    yield writer.Skip(name, f"reason {name}", "ä")

  summary = writer.write_dataset(path, {"train": 1}, make, {"name": name}, workers=0)
  assert "d\\udce9: 1 train examples; skipped 1 (1 reason caf\\udce9.jpg" in str(summary)
  [line] = (path / "skipped.jsonl").read_text("utf-8").splitlines()
  assert json.loads(line) == {"key": name, "reason": f"reason {name}", "detail": "ä"}
  assert json.loads((path / "dataset.json").read_text("utf-8"))["recipe"]["name"] == name
  data = sources.Dataset(sources.Source(str(path), "train"))
  assert data.read(0).texts["key"] == [b"caf\xe9.jpg"]


@pytest.mark.parametrize(
  "found, wanted, expected",
  [
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b was 2, now 3"),
    ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 5}}, "a.y was 2, now 5"),
    ({"a": 1}, {"b": 1}, "b was not set, now 1; a was 1, now not set"),
    ({"a": [1, {"x": 2}]}, {"a": [1, {"x": 3}]}, "a[1].x was 2, now 3"),
    ({"a": [1]}, {"a": [1, 2]}, "a was [1], now [1, 2]"),
    ({"a": None}, {"a": 0}, "a was None, now 0"),
  ],
)
def test_difference(found: object, wanted: object, expected: str):
  assert unfinished.difference(found, wanted) == expected


def test_difference_of_long_values():
  """The excerpt contains the first difference even after 60 characters."""
  text = unfinished.difference({"a": "x" * 500 + "1" + "z" * 90}, {"a": "x" * 500 + "2"})
  assert "1zzz" in text and text.endswith("xx2") and len(text) < 180
  was, now = text.removeprefix("a was ").split(", now ")
  assert was != now
