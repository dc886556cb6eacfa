import io
import json
import pathlib
import sys

import numpy as np
from PIL import Image
import pytest

from ov_data import example, records
from ov_data import shards as shards_lib
from ov_data.loader import Loader
from ov_data.sources import Dataset, Source
from ov_data.tokenizer import Tokenizer


def _write(path, texts, **more):
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  data = [example.serialise({"jpg": b"\xff\xd8", "txt": text, **more}) for text in texts]
  pathlib.Path(path).write_bytes(b"".join(map(records.frame, data)))


def _texts(dataset):
  return [dataset.read(n).texts["txt"][0].decode() for n in range(len(dataset))]


@pytest.fixture
def shards(tmp_path):
  """Three train shards with 4 records each and one val shard; texts are 0, 1, 2, ..."""
  for number in range(3):
    name = f"train-{number:05d}-of-00003.tfrecord"
    _write(tmp_path / "d" / name, map(str, range(4 * number, 4 * number + 4)))
  _write(tmp_path / "d" / "val-00000-of-00001.tfrecord", ["v0", "v1"])
  return tmp_path / "d"


def test_ways_to_name_shards(shards):
  (shards / "notes.txt").write_text("x")
  (shards / "info.json").write_text("{}")
  train = [str(shards / f"train-{number:05d}-of-00003.tfrecord") for number in range(3)]
  assert shards_lib.find_shards(str(shards), "train") == train
  assert shards_lib.find_shards(str(shards) + "/", "train") == train
  assert shards_lib.find_shards(f"{shards}/train-*") == train
  assert shards_lib.find_shards(f"{shards}/train@3") == train
  assert shards_lib.find_shards(f"{shards}/train@") == train
  assert shards_lib.find_shards(train[1]) == train[1:2]
  Dataset(Source(str(shards), split="train"))  # creates sidecars, which are not shards
  assert shards_lib.find_shards(f"{shards}/train-*") == train
  assert shards_lib.find_shards(str(shards), "train") == train
  assert _texts(Dataset(Source((train[2], train[0])))) == [
    str(n) for n in (8, 9, 10, 11, *range(4))
  ]


def test_split_as_a_subdirectory(tmp_path):
  _write(tmp_path / "train" / "00000.tfrecord", ["a"])
  _write(tmp_path / "val" / "00000.tfrecord", ["b"])
  assert _texts(Dataset(Source(str(tmp_path), split="val"))) == ["b"]


@pytest.mark.parametrize(
  "split, expected",
  [
    ("train", range(12)),
    ("train[:25%]", range(3)),
    ("train[25%:]", range(3, 12)),
    ("train[5:9]", range(5, 9)),
    ("train[10:100]", range(10, 12)),
    ("train[-2:]", range(10, 12)),
    ("train[50%:][:2]", range(6, 8)),
    ("train[6:7]", [6]),
    ("val[1:]", ["v1"]),
  ],
)
def test_splits_and_slices(shards, split, expected):
  dataset = Dataset(Source(str(shards), split=split))
  assert _texts(dataset) == list(map(str, expected))


def test_locate(shards):
  dataset = Dataset(Source(str(shards), split="train"))
  shard, offset = dataset.locate(6)
  raw = pathlib.Path(shard).read_bytes()
  assert shard.endswith("train-00001-of-00003.tfrecord")
  assert example.parse(raw[offset : offset + int(dataset.indexes[1].lengths[2])])["txt"] == [b"6"]


@pytest.mark.parametrize("run", [2, 3, 5, 100])
def test_runs_read_the_same(shards, run):
  source = Source(str(shards), split="train[1:11]")
  plain = Dataset(source)
  runs = Dataset(source, run=run, cached_runs=2)
  for record in np.random.default_rng(0).permutation(len(plain)):
    assert runs.read(record) == plain.read(record)


def test_runs_are_fetched_once(shards, monkeypatch):
  dataset = Dataset(Source(str(shards), split="train"), run=4, cached_runs=3)
  fetched = []
  load = dataset._records._runs._load
  monkeypatch.setattr(
    dataset._records._runs, "_load", lambda run: (fetched.append(run), load(run))[1]
  )
  for record in np.random.default_rng(0).permutation(12):
    dataset.read(record)
  assert sorted(fetched) == [0, 1, 2]


def test_fingerprint_depends_on_the_data_but_not_the_path(shards, tmp_path):
  fingerprint = Dataset(Source(str(shards), split="train")).fingerprint
  moved = shards.rename(tmp_path / "moved")
  assert Dataset(Source(str(moved), split="train")).fingerprint == fingerprint
  assert Dataset(Source(str(moved), split="train[1:]")).fingerprint != fingerprint
  _write(moved / "train-00000-of-00003.tfrecord", map(str, range(4, 8)))
  assert Dataset(Source(str(moved), split="train")).fingerprint != fingerprint


def test_record_changed_after_indexing(shards):
  dataset = Dataset(Source(str(shards), split="val"))
  path, offset = dataset.locate(1)
  raw = bytearray(pathlib.Path(path).read_bytes())
  raw[offset + 2] ^= 1
  pathlib.Path(path).write_bytes(raw)
  dataset.read(0)
  with pytest.raises(records.RecordError, match="data checksum"):
    dataset.read(1)


def _fails(message, **source):
  with pytest.raises(ValueError, match=message):
    Dataset(Source(**source))


def test_errors_list_existing_names(shards, tmp_path):
  here = str(shards)
  _fails(r"no shards at .*/absent: no such file", path=str(tmp_path / "absent"))
  _fails(r"no shards at .*\*\.tar: no file matches", path=f"{here}/*.tar")
  _fails(r"no file is named .*test-\?", path=f"{here}/test@4")
  _fails(r"contains several splits \(train, val\)", path=here)
  _fails(r"no \*\.tfrecord\* file of split 'test'", path=here, split="test")
  _fails(r"split='train\[1\]'", path=here, split="train[1]")
  _fails(r"split='train\[1:2'", path=here, split="train[1:2")
  _fails(r"split='train\[5:5\]' selects none of the records", path=here, split="train[5:5]")
  (tmp_path / "empty").mkdir()
  _fails(r"no \*\.tfrecord\* file in it", path=str(tmp_path / "empty"))
  (shards / "train-00001-of-00003.tfrecord").unlink()
  _fails(r"1 of 3 shards are missing \(number 1", path=here, split="train")
  _fails(r"1 of 3 shards are missing \(number 1", path=f"{here}/train-*")  # also matches number 1
  assert len(Dataset(Source(f"{here}/train-0000[02]*"))) == 8  # requests exactly these two


def test_no_usable_record(tmp_path):
  (tmp_path / "a.tfrecord").write_bytes(b"\x1f\x8b\x08" + bytes(100))
  _fails("no usable record .* at byte 0: gzip-compressed shard", path=str(tmp_path))
  (tmp_path / "a.tfrecord").write_bytes(b"")
  _fails("no usable record .* they are empty", path=str(tmp_path))


def test_missing_keys_name_the_present_ones(shards):
  for source, key in (
    (Source(str(shards), split="val", image_key="image/encoded"), "image/encoded"),
    (Source(str(shards), split="val", caption_keys=("txt", "llava_caption")), "llava_caption"),
  ):
    with pytest.raises(ValueError, match=f"'{key}' is in none of the first 2 .* have jpg, txt"):
      Dataset(source).check_keys()
  with pytest.raises(ValueError, match="'label' is in none"):
    Dataset(Source(str(shards), split="val")).check_keys(["label"])


def test_remote_paths_read_the_same(shards, monkeypatch, tmp_path):
  # TensorFlow's in-memory file system replaces gs://; both use the same code.
  gfile = pytest.importorskip("tensorflow").io.gfile
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))
  gfile.makedirs("ram://bucket/d/")
  for path in sorted(shards.iterdir()):
    with gfile.GFile(f"ram://bucket/d/{path.name}", "wb") as file:
      file.write(path.read_bytes())
  local = Dataset(Source(str(shards), split="train"))
  for run in (1, 5):
    remote = Dataset(Source("ram://bucket/d", split="train"), run=run)
    assert [remote.read(n) for n in range(12)] == [local.read(n) for n in range(12)]
    assert remote.fingerprint == local.fingerprint
  assert gfile.exists("ram://bucket/d/train-00000-of-00003.tfrecord.ovidx")
  assert len(Dataset(Source("ram://bucket/d/train@3"))) == 12
  assert len(Dataset(Source("ram://bucket/d/val-*"))) == 2
  _fails("no such file or directory", path="ram://bucket/absent")
  _fails("split 'test'", path="ram://bucket/d", split="test")


def test_remote_images_read_the_same(tmp_path):
  gfile = pytest.importorskip("tensorflow").io.gfile
  buffer = io.BytesIO()
  Image.new("RGB", (6, 4), (200, 0, 0)).save(buffer, "PNG")
  files = dict.fromkeys(("val/cat/1.png", "val/cat/more/2.png", "val/dog/3.png"), buffer.getvalue())
  images = [
    {"filepath": "val/cat", "filename": f"{number}.png", "sentences": [{"raw": "a cat"}]}
    for number in (1, 9)  # missing shard
  ]
  files["dataset.json"] = json.dumps({"images": images}).encode()
  files["listed/3.png"] = buffer.getvalue()
  files["listed/captions.jsonl"] = b'{"file": "3.png", "caption": "a cat"}\n'
  for name, data in files.items():
    for root in (str(tmp_path), "ram://pictures"):
      gfile.makedirs(f"{root}/{name}".rpartition("/")[0])
      with gfile.GFile(f"{root}/{name}", "wb") as file:
        file.write(data)
  local, remote = (Dataset(Source(root, "val")) for root in (str(tmp_path), "ram://pictures"))
  assert len(local) == 3 and remote.fingerprint == local.fingerprint
  assert [remote.read(n) for n in range(3)] == [local.read(n) for n in range(3)]
  shared = dict(image_size=4, batch_size=4, tokenizer=Tokenizer.train(["a cat"], 30), text_len=4)
  for source, valid in (
    (Source("ram://pictures", "val", caption_keys=("class",)), 3),
    (Source("ram://pictures/dataset.json"), 1),
    (Source("ram://pictures/listed"), 1),
    (Source(f"{tmp_path}/dataset.json", image_root="ram://pictures"), 1),
  ):
    with Loader.evaluation(source, **shared) as batches:
      (batch,) = batches
      assert batch["valid"].sum() == valid and batch["image"][0, 0, 0].tolist() == [200, 0, 0]
      assert batches.skipped["image file is missing"] == ("dataset.json" in source.path)


def test_missing_tensorflow_error_names_the_remedy(tmp_path, monkeypatch):
  for name in ("tensorflow", "tensorflow.io", "tensorflow_datasets"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ImportError, match=r"reading gs://b/d.* pip install 'ov-data\[tensorflow\]'"):
    Dataset(Source("gs://b/d"))
  (tmp_path / "dataset_info.json").write_text("{}")
  with pytest.raises(ImportError, match="is a TensorFlow Datasets directory, and that library"):
    Dataset(Source(str(tmp_path)))


def test_tensorflow_datasets_directory(tmp_path):
  pytest.importorskip("tensorflow")  # TFDS imports without it, but cannot write or decode
  tfds = pytest.importorskip("tensorflow_datasets")
  features = tfds.features.FeaturesDict(
    {
      "jpg": tfds.features.Image(encoding_format="jpeg"),
      "txt": tfds.features.Text(),
      "meta": {"captions": tfds.features.Sequence(tfds.features.Text())},
    }
  )

  def serialised(number):
    image = np.zeros((8, 8, 3), np.uint8)
    captions = [f"{number}a", f"{number}b"]
    values = {"jpg": image, "txt": str(number), "meta": {"captions": captions}}
    return records.frame(features.serialize_example(features.encode_example(values)))

  for shard in range(2):
    data = b"".join(serialised(number) for number in range(10 * shard, 10 * shard + 10))
    (tmp_path / f"pairs-full.tfrecord-{shard:05d}-of-00002").write_bytes(data)
  template = tfds.core.ShardedFileTemplate(
    data_dir=tmp_path, dataset_name="pairs", split="full", filetype_suffix="tfrecord"
  )
  split = tfds.core.SplitInfo(
    name="full", shard_lengths=[10, 10], num_bytes=0, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=tmp_path, features=features, split_infos=[split], filename_template=template
  )

  texts = list(map(str, range(20)))
  whole = Dataset(Source(str(tmp_path)))
  assert _texts(whole) == texts
  assert whole.read(3).texts["meta/captions"] == [b"3a", b"3b"]
  assert _texts(Dataset(Source(str(tmp_path), split="full[25%:]"))) == texts[5:]
  _fails("has the splits full; split='train'", path=str(tmp_path), split="train")

  shard = tmp_path / "pairs-full.tfrecord-00001-of-00002"  # truncated copy
  shard.write_bytes(b"".join(serialised(number) for number in range(10, 17)))
  message = r"dataset_info\.json: split 'full' has 20 records, but .*00001-of-00002 holds 7 of 10"
  for split in (None, "full", "full[:2]"):
    _fails(message, path=str(tmp_path), split=split)
  _fails(message, path=f"{tmp_path}/pairs-full.tfrecord-*")


def test_caption_keys_that_are_one_name():
  with pytest.raises(
    ValueError, match=r"caption_keys='txt': expected a tuple of names, \('txt',\)"
  ):
    Source("data", caption_keys="txt")
