"""Writer: atomic shards, resuming, number of processes, errors, and the manifest."""

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ov_data import example, processes, records, sources, writer


@dataclasses.dataclass(frozen=True)
class _Numbers:
  """Ten examples per shard with every fifth skipped; one shard can be set to fail."""

  fail: int = -1
  log: str = ""

  def __call__(self, split: str, number: int) -> Iterator[writer.Features | writer.Skip]:
    if self.log:
      with open(self.log, "a") as file:
        file.write(f"{split}{number}\n")
    for i in range(10):
      if number == self.fail and i == 7:
        raise RuntimeError("no such luck")
      key = f"{split}-{number}-{i}"
      if i % 5 == 4:
        yield writer.Skip(key, "fifth", f"i={i}")
      else:
        yield {"key": key, "number": i, "ratio": i / 2, "txt": ["one", "two"]}


_SHARDS = {"train": 3, "test": 1}


def _files(path: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _read(path: pathlib.Path, split: str) -> list[dict[str, example.Feature]]:
  data = sources.Dataset(sources.Source(str(path), split))
  return [data.features(i) for i in range(len(data))]


def test_written_shards_can_be_read(tmp_path: pathlib.Path):
  seen: list[int] = []
  summary = writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {}, workers=0, progress=seen.append)
  assert summary.examples == {"train": 24, "test": 8}
  assert summary.skipped == {"fifth": 8} and sum(seen) == 40 and summary.resumed == 0
  assert "24 train, 8 test examples; skipped 8 (8 fifth; listed in skipped.jsonl)" in str(summary)
  rows = _read(tmp_path, "train")
  assert [r["key"] for r in rows][:2] == [[b"train-0-0"], [b"train-0-1"]]
  assert rows[3]["number"].tolist() == [3] and rows[3]["ratio"].tolist() == [1.5]
  assert rows[3]["txt"] == [b"one", b"two"]
  manifest = json.loads((tmp_path / "dataset.json").read_text())
  assert manifest["features"] == {
    "key": "bytes", "number": "int64", "ratio": "float", "txt": "bytes",
  }  # fmt: skip
  assert manifest["splits"]["train"]["fingerprint"] == summary.fingerprints["train"]
  skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
  assert len(skipped) == 8
  assert skipped[0] == {"key": "train-0-4", "reason": "fifth", "detail": "i=4"}
  assert len(list(tmp_path.glob("*.ovidx"))) == 4
  assert not (tmp_path / "dataset.progress").exists()


def test_any_number_of_processes_gives_the_same_files(tmp_path: pathlib.Path):
  writer.write_dataset(tmp_path / "a", _SHARDS, _Numbers(), {}, workers=0)
  writer.write_dataset(tmp_path / "b", _SHARDS, _Numbers(), {}, workers=2)
  assert _files(tmp_path / "a") == _files(tmp_path / "b")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_run_is_resumed(tmp_path: pathlib.Path, workers: int):
  with pytest.raises(RuntimeError, match="no such luck"):
    writer.write_dataset(tmp_path / "a", _SHARDS, _Numbers(fail=1), {"x": 1}, workers=workers)
  names = {p.name for p in (tmp_path / "a").iterdir()}
  assert "train-00001-of-00003.tfrecord" not in names and "dataset.json" not in names
  log = tmp_path / "log"
  finished = sum(n.endswith(".tfrecord") for n in names)
  summary = writer.write_dataset(
    tmp_path / "a", _SHARDS, _Numbers(log=str(log)), {"x": 1}, workers=0
  )
  assert len(log.read_text().split()) == 4 - summary.resumed
  assert workers or summary.resumed == finished == 1
  writer.write_dataset(tmp_path / "b", _SHARDS, _Numbers(), {"x": 1}, workers=0)
  assert _files(tmp_path / "a") == _files(tmp_path / "b")


class Slow:
  """One fast shard, then slow ones; also used by a process that is killed."""

  def __call__(self, split: str, number: int) -> Iterator[writer.Features]:
    for i in range(100):
      time.sleep(0.01 if number else 0)
      yield {"txt": f"{number} {i}"}


def test_a_killed_run_is_resumed(tmp_path: pathlib.Path):
  program = (
    "import sys; from ov_data import writer, writer_test;"
    "writer.write_dataset(sys.argv[1], {'train': 2}, writer_test.Slow(), {}, workers=1)"
  )
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], env=env)
  logs = tmp_path / "a" / "dataset.progress"
  while not len(list(logs.glob("train-*.json"))) >= 1 and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "a" / "dataset.json").exists()
  summary = writer.write_dataset(tmp_path / "a", {"train": 2}, Slow(), {}, workers=0)
  assert summary.examples == {"train": 200} and summary.resumed == 1
  texts = [row["txt"] for row in _read(tmp_path / "a", "train")]
  assert texts == [[f"{number} {i}".encode()] for number in range(2) for i in range(100)]


def test_a_complete_data_set_is_not_modified(tmp_path: pathlib.Path):
  first = writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {"a": (1, 2)}, workers=0)
  again = writer.write_dataset(tmp_path, _SHARDS, _Numbers(fail=0), {"a": (1, 2)}, workers=0)
  assert again.examples == first.examples and again.fingerprints == first.fingerprints
  assert again.resumed == 4


def test_another_recipe_is_rejected_then_replaced(tmp_path: pathlib.Path):
  writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {"seed": 1}, workers=0)
  with pytest.raises(ValueError, match="another data set: seed was 1, now 2"):
    writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {"seed": 2}, workers=0)
  with pytest.raises(
    ValueError,
    match=r"shards\.train was 3, now 2; shards\.test was 1, now not set.*another directory",
  ):
    writer.write_dataset(tmp_path, {"train": 2}, _Numbers(), {"seed": 1}, workers=0)
  summary = writer.write_dataset(
    tmp_path, {"train": 1}, _Numbers(), {"seed": 2}, workers=0, overwrite=True
  )
  assert summary.examples == {"train": 8}
  assert len(list(tmp_path.glob("*.tfrecord"))) == 1


def test_unfinished_work_of_another_recipe_is_rejected(tmp_path: pathlib.Path):
  with pytest.raises(RuntimeError):
    writer.write_dataset(tmp_path, _SHARDS, _Numbers(fail=1), {"seed": 1}, workers=0)
  with pytest.raises(ValueError, match="seed was 1, now 2"):
    writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {"seed": 2}, workers=0)


def test_records_of_unknown_origin_are_rejected(tmp_path: pathlib.Path):
  (tmp_path / "x-00000-of-00001.tfrecord").write_bytes(records.frame(b"mine"))
  with pytest.raises(ValueError, match="contains record files but neither"):
    writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {}, workers=0)
  assert (tmp_path / "x-00000-of-00001.tfrecord").exists()


def test_damaged_manifest_is_named(tmp_path: pathlib.Path):
  (tmp_path / "dataset.json").write_text("{")
  with pytest.raises(ValueError, match=r"dataset\.json is damaged"):
    writer.write_dataset(tmp_path, _SHARDS, _Numbers(), {}, workers=0)


def test_a_shard_without_examples(tmp_path: pathlib.Path):
  summary = writer.write_dataset(tmp_path, {"train": 1, "test": 1}, _only_train, {}, workers=0)
  assert summary.examples == {"train": 1, "test": 0}
  assert summary.fingerprints["test"] == ""


def _only_train(split: str, number: int) -> Iterator[writer.Features]:
  if split == "train":
    yield {"key": "a"}


def _die(item: int, report: processes.Report) -> int:
  if item == 3:
    os._exit(9)
  report(1)
  print("printing does not disturb the answers")
  return item * item


def test_processes():
  counted: list[int] = []
  results = dict(processes.map_in_processes(_die, [0, 1, 2], 2, counted.append))
  assert results == {0: 0, 1: 1, 2: 4} and len(counted) == 3


def test_a_dead_process_is_reported():
  with pytest.raises(ChildProcessError, match="ended with code 9 at 3"):
    list(processes.map_in_processes(_die, [1, 3, 2, 4, 5], 2))


def _raise(item: type[BaseException], report: processes.Report) -> None:
  report(1)
  raise item("from the function")


@pytest.mark.parametrize("kind", [EOFError, BrokenPipeError, KeyError, UnicodeError])
def test_errors_of_the_function_are_not_reported_as_a_dead_process(kind: type[BaseException]):
  with pytest.raises(kind, match="from the function"):
    list(processes.map_in_processes(_raise, [kind, kind], 2))


def _closed(count: int) -> None:
  raise BrokenPipeError("the terminal is closed")


def test_errors_of_reporting_end_the_run():
  with pytest.raises(BrokenPipeError, match="the terminal is closed"):
    list(processes.map_in_processes(_die, [1, 2], 2, _closed))
