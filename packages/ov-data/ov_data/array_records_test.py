"""Tests of ArrayRecord files: groups, damage, slices, and files of another format."""

from pathlib import Path
import sys

import numpy as np
import pytest

from ov_data import Dataset, Source, example
from ov_data.records import RecordError
from ov_data.testing.shards import write_array_record

array_record_module = pytest.importorskip("array_record.python.array_record_module")


def _open(path: Path, run: int = 1, **arguments) -> Dataset:
  return Dataset(Source(str(path), **arguments), run=run)


def _rows(first: int, stop: int) -> list[dict[str, bytes | str | int]]:
  return [{"jpg": b"%d" % n * 99, "txt": f"{n}", "label": n} for n in range(first, stop)]


@pytest.mark.parametrize("run", [1, 3, 8])
def test_records_of_several_files(tmp_path, run):
  for number in range(2):  # the names of TensorFlow Datasets
    name = f"set-train.array_record-{number:05d}-of-00002"
    write_array_record(tmp_path / name, _rows(10 * number, 10 * number + 10))
  found = _open(tmp_path, run, split="set-train[2:17]")
  assert [found.read(n).image for n in range(15)] == [b"%d" % n * 99 for n in range(2, 17)]
  record = found.read(9, ["label", "txt"])
  assert record.texts == {"txt": [b"11"]} and record.labels["label"].tolist() == [11]
  assert found.locate(9) == (str(tmp_path / "set-train.array_record-00001-of-00002"), 1)
  with pytest.raises(
    ValueError, match="no shards at .*split 'test' in it; its splits are set-train"
  ):
    _open(tmp_path, split="test")


def test_groups_of_several_records(tmp_path):
  path = tmp_path / "a.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:4")
  for row in _rows(0, 10):
    writer.write(example.serialise(row))
  writer.close()
  found = _open(path)
  assert [found.read(n).texts["txt"] for n in (9, 0, 5)] == [[b"9"], [b"0"], [b"5"]]


@pytest.mark.parametrize("run", [1, 4])
def test_damage_is_a_bad_record(tmp_path, run):
  path = tmp_path / "a.array_record"
  rng = np.random.default_rng(0)
  images = [rng.bytes(50_000) for _ in range(8)]
  write_array_record(path, [{"jpg": image, "txt": "a"} for image in images])
  data = bytearray(path.read_bytes())
  at = data.find(images[3][1000:1010])
  data[at : at + 10] = bytes(10)
  path.write_bytes(data)
  found = _open(path, run)
  assert all(found.read(n).image == image for n, image in enumerate(images) if n != 3)
  with pytest.raises(RecordError, match="damaged record") as caught:
    found.read(3)
  assert caught.value.offset == 3 and found.location(3) == f"{path} at record 3"


@pytest.mark.parametrize("content", [b"", b"x" * 99, b"<html>404</html>" * 9999])
def test_other_files_are_refused(tmp_path, content):
  (tmp_path / "a.array_record").write_bytes(content)
  with pytest.raises(ValueError, match="not a readable ArrayRecord file. Are they ArrayRecord"):
    _open(tmp_path / "a.array_record")


def test_records_that_are_no_examples(tmp_path):
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
  writer.write(b"\xff something")
  writer.close()
  with pytest.raises(ValueError, match="not a tf.train.Example"):
    _open(tmp_path / "a.array_record").read(0)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
  write_array_record(tmp_path / "a.array_record", _rows(0, 2))
  for name in ("array_record", "array_record.python"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ImportError, match=r"pip install 'ov-data\[array_record\]'"):
    _open(tmp_path / "a.array_record")
