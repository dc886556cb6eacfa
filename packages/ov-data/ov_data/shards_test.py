"""Shards: path resolution, comparison with manifests, damage, and messages."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from ov_data import example, records, shard_names, shards
from ov_data.request import Request
from ov_data.sources import Dataset, Source
from ov_data.splits import Split


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))


def _frames(first, count):
  numbers = range(first, first + count)
  return [records.frame(example.serialise({"n": number, "pad": b"x" * 200})) for number in numbers]


def _write(path, first=0, count=10):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(b"".join(_frames(first, count)))


@pytest.fixture(params=["own", "own, totals only", "tfds"])
def data(tmp_path, request):
  """Four shards of 10 records with a manifest."""
  folder = tmp_path / "d"
  tfds = request.param == "tfds"
  for number in range(4):
    name = f"train-{number:05d}-of-00004.tfrecord"
    _write(folder / (f"set-train.tfrecord-{number:05d}-of-00004" if tfds else name), 10 * number)
  if tfds:
    split = {"name": "train", "shardLengths": ["10"] * 4, "numBytes": "1"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "set", "splits": [split], "version": "1.0.0", "fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
  else:
    split = {"examples": 40, "shards": 4, "fingerprint": ""}
    if request.param == "own":
      split |= {"records": [10] * 4, "bytes": [p.stat().st_size for p in sorted(folder.iterdir())]}
    content = {"format": "ov_data dataset 1", "splits": {"train": split}}
    (folder / "dataset.json").write_text(json.dumps(content))
  return folder


def _open(path, split=None):
  return shards.Shards(Request(Source(str(path)), Split.parse(split)))


def _path(folder, number):
  return next(folder.glob(f"*-{number:05d}-of-00004*"))


def _numbers(opened):
  return [int(opened.read(record).labels["n"][0]) for record in range(len(opened))]


def test_counts_that_fit(data):
  assert _numbers(_open(f"{data}/*-of-00004*")) == list(range(40))
  assert _numbers(_open(f"{data}/*-of-00004*", "[5:15]")) == list(range(5, 15))


@pytest.mark.parametrize("left", [0, 7])
def test_a_shard_cut_between_records_is_an_error(data, left):
  """The shard is empty or lacks its last three records."""
  path = _path(data, 1)
  path.write_bytes(b"".join(_frames(10, left)))
  found = rf"({path.name} holds {left} of 10|shards hold {30 + left}; .*{path.name} with {left})"
  for split in (None, "[:5]"):
    message = rf"dataset\w*\.json: split 'train' has 40 records, but .*{found}.*Copy these shards"
    with pytest.raises(ValueError, match=message):
      _open(f"{data}/*-of-00004*", split)


def test_other_shards_can_be_read_without_the_short_one(data):
  _path(data, 1).write_bytes(b"")
  assert len(_open(f"{data}/*-0000[023]-of-00004*")) == 30


def test_more_records_than_in_the_manifest_are_an_error(data):
  path = _path(data, 2)
  path.write_bytes(path.read_bytes() + _frames(99, 1)[0])
  with pytest.raises(ValueError, match=rf"{path.name} holds 11 of 10|shards hold 41"):
    _open(f"{data}/*-of-00004*")


def _flip(path, *offsets):
  data = bytearray(path.read_bytes())
  for offset in offsets:
    data[offset] ^= 0x55
  path.write_bytes(data)


def test_damaged_records_are_counted_not_missing(data):
  size = len(_frames(10, 1)[0])
  _flip(_path(data, 1), 3 * size + 50, 5 * size)  # data of record 3, length of record 5
  opened = _open(f"{data}/*-of-00004*")
  assert _numbers(opened) == [n for n in range(40) if n not in (13, 15)]
  assert [skip.reason for skip in opened.skips] == ["data checksum", "length checksum"]
  where = f"1 record in bytes {5 * size} to {6 * size}"
  assert opened.skips[1].detail == where and opened.skips[1].key.endswith(f"at byte {5 * size}")


def test_a_damaged_stretch_counts_all_its_records(data):
  """The manifest has the number of records in ranges without a valid header."""
  size = len(_frames(10, 1)[0])
  path = _path(data, 1)
  content = bytearray(path.read_bytes())
  content[2 * size : 6 * size - 1] = bytes(4 * size - 1)
  path.write_bytes(content)
  opened = _open(f"{data}/*-of-00004*")
  assert _numbers(opened) == [n for n in range(40) if not 12 <= n < 16]
  assert [skip.reason for skip in opened.skips] == ["length checksum"] * 4
  assert opened.skips[0].detail == f"4 records in bytes {2 * size} to {6 * size}"


def test_a_shard_without_any_valid_record(data):
  """Its records are counted from the manifest."""
  path = _path(data, 2)
  path.write_bytes(bytes(path.stat().st_size))
  opened = _open(f"{data}/*-of-00004*")
  assert _numbers(opened) == [n for n in range(40) if not 20 <= n < 30]
  assert [skip.reason for skip in opened.skips] == ["length checksum"] * 10


def test_a_shard_cut_within_a_record(data):
  """The truncated record is damaged; the following records are missing."""
  path, size = _path(data, 3), len(_frames(30, 1)[0])
  os.truncate(path, 10 * size - 5)
  assert [skip.reason for skip in _open(f"{data}/*-of-00004*").skips] == ["truncated record"]
  os.truncate(path, 8 * size - 5)
  with pytest.raises(ValueError, match=rf"{path.name} (holds 7 of 10|with 7)"):
    _open(f"{data}/*-of-00004*")


def test_shards_without_manifest_are_not_compared(tmp_path):
  _write(tmp_path / "d" / "train-00000-of-00002.tfrecord")
  (tmp_path / "d" / "train-00001-of-00002.tfrecord").write_bytes(b"")
  assert len(_open(tmp_path / "d")) == 10


@pytest.mark.parametrize(
  "content", ["[]", "3", '{"images": []}', '{"format": "other", "splits": 1}']
)
def test_a_manifest_of_another_program_is_ignored(tmp_path, content):
  _write(tmp_path / "d" / "train-00000-of-00001.tfrecord")
  (tmp_path / "d" / "dataset.json").write_text(content)
  assert len(_open(tmp_path / "d")) == 10


_SPLIT = {"examples": 10, "shards": 1, "fingerprint": ""}


@pytest.mark.parametrize(
  "content",
  [
    "{",
    "[" * 100_000,
    "9" * 10_000,
    b"\xff\xfe",
    {"splits": [1]},
    {"splits": {"train": 5}},
    {"splits": {"train": {**_SPLIT, "examples": "10"}}},
    {"splits": {"train": {**_SPLIT, "shards": None}}},
    {"splits": {"train": {**_SPLIT, "records": 10}}},
    {"splits": {"train": {**_SPLIT, "records": [10, 0]}}},
    {"splits": {"train": {**_SPLIT, "records": [9]}}},
    {"splits": {"train": {**_SPLIT, "bytes": [-1]}}},
    {},
    {"format": "ov_date dataset 1", "recipe": {}, "features": {}, "splits": {}, "skipped": {}},
  ],
)
def test_a_damaged_manifest_is_an_error_in_one_line(tmp_path, content):
  _write(tmp_path / "d" / "train-00000-of-00001.tfrecord")
  if isinstance(content, dict):
    content = json.dumps({"format": "ov_data dataset 1", **content})
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / "d" / "dataset.json").write_bytes(content)
  with pytest.raises(ValueError, match=r"dataset\.json is damaged .*copy it again, or remove it"):
    _open(tmp_path / "d")


def test_a_manifest_with_impossible_numbers_takes_no_time(tmp_path):
  _write(tmp_path / "d" / "train-00000-of-00001.tfrecord")
  split = {**_SPLIT, "shards": 10**15}
  content = {"format": "ov_data dataset 1", "splits": {"train": split}}
  (tmp_path / "d" / "dataset.json").write_text(json.dumps(content))
  assert len(_open(tmp_path / "d")) == 10  # the manifest counts another set of shards
  (tmp_path / "d" / "train-00000-of-99999999999999.tfrecord").write_bytes(b"")
  with pytest.raises(ValueError, match="several sets"):
    _open(tmp_path / "d")


# Paths


@pytest.mark.parametrize(
  "name", ["set@2", "b[1]", "what?", "a*b", "{x}", "[!a]", "x@", "tab\tnl\n"]
)
def test_folders_with_special_names(tmp_path, name):
  folder = tmp_path / name
  for number in range(3):
    _write(folder / f"train-{number:05d}-of-00003.tfrecord", 10 * number)
  _write(tmp_path / "b1" / "train-00000-of-00001.tfrecord", 500)  # matched by the pattern b[1]
  train = [str(folder / f"train-{number:05d}-of-00003.tfrecord") for number in range(3)]
  assert shards.find_shards(str(folder), "train") == train
  assert shards.find_shards(f"{folder}/train-*") == train
  assert shards.find_shards(f"{folder}/train-0000[12]-*") == train[1:]
  assert shards.find_shards(f"{folder}/train@3") == train
  assert shards.find_shards(f"{folder}/train@") == train
  assert shards.find_shards(train[1]) == train[1:2]
  assert shards.find_shards(f"{tmp_path}/*/train-*-of-00003.tfrecord") == train
  assert len(Dataset(Source(str(folder), "train"))) == 30


def test_files_with_special_names(tmp_path):
  for name in ("a[1].tfrecord", "b@3", "we[ird]-00000-of-00001.tfrecord", "q?.tfrecord"):
    _write(tmp_path / name)
  for name in ("a[1].tfrecord", "b@3", "q?.tfrecord"):
    assert shards.find_shards(f"{tmp_path}/{name}") == [f"{tmp_path}/{name}"]
  assert shards.find_shards(f"{tmp_path}/we[ird]@1") == [
    f"{tmp_path}/we[ird]-00000-of-00001.tfrecord"
  ]


def test_numbers_in_the_names_of_folders(tmp_path):
  _write(tmp_path / "run-00000-of-00007" / "train-00000-of-00001.tfrecord")
  assert len(_open(tmp_path / "run-00000-of-00007")) == 10


def test_missing_shards_that_a_glob_means(tmp_path):
  for number in (0, 2):
    _write(tmp_path / f"train-{number:05d}-of-00004.tfrecord")
  for pattern in ("train-*", "train-*-of-00004.tfrecord", "train-0000?-of*", "*"):
    with pytest.raises(
      ValueError, match=r"train: 2 of 4 shards are missing \(number 1 is the first"
    ):
      _open(f"{tmp_path}/{pattern}")
  assert len(_open(f"{tmp_path}/train-0000[02]-*")) == 20
  paths = [f"{tmp_path}/train-0000{number}-of-00004.tfrecord" for number in (0, 2)]
  assert len(shards.Shards(Request(Source(tuple(paths)), Split(None)))) == 20


def test_old_and_new_shards_are_not_mixed(tmp_path):
  _write(tmp_path / "train-00000-of-00001.tfrecord")
  for number in range(2):
    _write(tmp_path / f"train-{number:05d}-of-00002.tfrecord")
  with pytest.raises(ValueError, match="several sets .*-of-00001, -of-00002.*remove the old ones"):
    _open(tmp_path, "train")
  assert len(_open(f"{tmp_path}/train-*-of-00002*")) == 20


def _fails(path, message, split=None):
  with pytest.raises(ValueError, match=message) as caught:
    _open(path, split)
  assert "\n" not in str(caught.value)


def test_a_glob_without_shards_lists_existing_files(tmp_path):
  for number in range(2):
    _write(tmp_path / f"train-{number:05d}-of-00002")
  here = str(tmp_path)
  message = (
    r"2 files match, and none has the name of a shard.*train-00000-of-00002 lacks that suffix"
  )
  _fails(f"{here}/train-*", message + ".*use train@2")
  _fails(here, r"no \*\.tfrecord\* file in it; train-00000-of-00002 lacks that suffix")
  assert len(_open(f"{here}/train@2")) == 20
  _fails(f"{here}/test-*", "no file matches; there are train-00000-of-00002, train-00001-of-00002$")
  _fails(f"{here}/train@3", "no file is named .*-of-00003; there are train-00000-of-00002")
  _fails(f"{here}/nowhere", "no such file or directory")
  os.symlink("nowhere", tmp_path / "link.tfrecord")
  _fails(f"{here}/link.tfrecord", "a broken link")
  _fails(f"{here}/a\0b", "contains a NUL byte")
  _fails(f"{here}/train-{{00000..00001}}.tfrecord", "2 of 2 files are missing, .*train-00000")
  _fails(f"{here}/train-{{00000,00001}}", "braces are only supported in ranges")
  _fails("gs:/bucket/x", "did you mean gs://bucket/x")
  _fails("", "is empty; name a folder")


@pytest.mark.parametrize(
  "name, what",
  [
    ("a.tar", "a tar file.*separate Source"),
    ("a.tar.gz", "a compressed tar file.*decompress"),
    ("a.tgz", "a compressed tar file"),
    ("a.zip", "an archive.*extract"),
    ("a.csv", r"a table.*captions\.jsonl.*tools/data:convert"),
    ("a.tsv", "a table"),
    ("a.jsonl", "a list of JSON lines.*tools/data:convert"),
    ("a.parquet", r"a Parquet file.*separate Source"),
    ("data-00000-of-00001.arrow", "an Arrow file"),
    ("set-train.array_record-00000-of-00001", "an ArrayRecord file.*separate Source"),
  ],
)
def test_other_formats_are_named(tmp_path, name, what):
  (tmp_path / name).write_bytes(b"something")
  _fails(tmp_path / name, rf"{name} is {what}")
  _fails(f"{tmp_path}/{name[:3]}*", rf"the match is {what}")
  _fails(tmp_path, rf"no \*\.tfrecord\* file in it; it holds {what}")
  shutil.copy(tmp_path / name, tmp_path / f"b{name}")
  _fails(tmp_path, "it holds 2 .*files|lists|tables|archives")


def test_a_folder_of_hugging_face_is_named(tmp_path):
  (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {}}))
  (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
  _fails(tmp_path, "it holds an Arrow file")


@pytest.mark.parametrize("content", ["{", '{"splits": [{"name": 5}]}'])
def test_a_damaged_tfds_directory(tmp_path, content):
  pytest.importorskip("tensorflow_datasets")
  _write(tmp_path / "set-train.tfrecord-00000-of-00001")
  (tmp_path / "dataset_info.json").write_text(content)
  message = "is damaged|cannot be opened as a TensorFlow Datasets directory"
  with pytest.raises(ValueError, match=message):
    Dataset(Source(str(tmp_path), "train"))


def test_compressed_shards(tmp_path):
  import gzip

  (tmp_path / "a.tfrecord.gz").write_bytes(gzip.compress(_frames(0, 3)[0]))
  _fails(tmp_path, r"no usable record .*at byte 0: gzip-compressed shard\. Decompress")
  _write(tmp_path / "a.tfrecord")
  message = r"1 of 2 shards have no usable record; first damage: .*a\.tfrecord\.gz .*Decompress"
  _fails(tmp_path, message + ".*or exclude them with a glob")


@pytest.mark.parametrize(
  "content, message",
  [
    (b"<html>404 Not Found</html>", "web page.*Are they TFRecord files"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    (b"x" * 999, "length checksum.*Are they TFRecord files"),
  ],
)
def test_files_that_are_not_shards(tmp_path, content, message):
  """Ignoring such a file would lose an unknown number of records."""
  (tmp_path / "train-00000-of-00002.tfrecord").write_bytes(content)
  _fails(f"{tmp_path}/train-00000*", f"no usable record in the 1 shard.*{message}")
  _write(tmp_path / "train-00001-of-00002.tfrecord")
  _fails(tmp_path, f"1 of 2 shards have no usable record; .*{message}")
  assert len(_open(f"{tmp_path}/*-00001-*")) == 10
  assert len(list(tmp_path.glob("*.ovidx"))) == 1  # none next to files that are not shards


def test_file_names_that_are_not_utf8(tmp_path):
  folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
  _write(folder + "/train-00000-of-00001.tfrecord")
  assert len(_open(folder)) == 10
  assert len(_open(f"{folder}/train-*")) == 10
  with pytest.raises(ValueError):
    _open(folder, "test")


def test_records_whose_feature_names_are_not_utf8(tmp_path):
  content = example.serialise({"txt": "a", "name": "b"}).replace(b"name", b"n\xe9me")
  (tmp_path / "a.tfrecord").write_bytes(records.frame(content))
  opened = _open(tmp_path)
  assert opened.read(0).texts == {"txt": [b"a"], "n\udce9me": [b"b"]}
  assert opened.read(0, ("txt",)).texts == {"txt": [b"a"]}


def test_a_folder_of_versions_names_one(tmp_path):
  _write(tmp_path / "pairs" / "1.0.0" / "pairs-train.tfrecord-00000-of-00001")
  _fails(tmp_path / "pairs", r"its subfolder 1\.0\.0 has some: use .*/pairs/1\.0\.0$", "train")


def test_find_all_counts_every_split(tmp_path):
  _write(tmp_path / "a" / "train-00000-of-00001.tfrecord")
  _write(tmp_path / "a" / "val-00000-of-00001.tfrecord")
  _write(tmp_path / "b" / "train" / "0.tfrecord")
  _write(tmp_path / "b" / "val" / "0.tfrecord")
  for folder in ("a", "b"):
    assert len(shard_names.find_all(str(tmp_path / folder))) == 2
  (tmp_path / "c" / "train").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"no shards at .*no \*\.tfrecord\* file in it"):
    shard_names.find_all(str(tmp_path / "c"))


def test_fingerprint_is_that_of_the_first_version(tmp_path):
  """Runs must resume with fingerprints stored by older versions."""
  rng = np.random.default_rng(0)
  frames = b"".join(records.frame(rng.bytes(50)) for _ in range(5))
  (tmp_path / "train-00000-of-00001.tfrecord").write_bytes(frames)
  assert _open(tmp_path).fingerprint == "6ed251aea802300a"
