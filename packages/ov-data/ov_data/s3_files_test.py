"""Tests of s3:// against a fake server: the same records, requests and bytes, and local caches."""

import numpy as np
import pytest

import ov_data
from ov_data import Dataset, Source, fs
from ov_data.testing.fake_s3 import FakeS3
from ov_data.testing.shards import WRITERS, photo_rows, write_shards

pytest.importorskip("pyarrow")

_FORMATS = [format for format in WRITERS if format != "array_record"]


@pytest.fixture
def store(monkeypatch, tmp_path):
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))
  with FakeS3() as store:
    for key, value in store.environment().items():
      monkeypatch.setenv(key, value)
    yield store


def _upload(store, folder, prefix):
  for path in folder.iterdir():
    if not path.name.endswith(".ovidx"):
      store.objects[f"{prefix}/{path.name}"] = path.read_bytes()


@pytest.mark.parametrize("format", _FORMATS)
def test_the_same_records_as_local_files(store, tmp_path, format):
  folder = write_shards(tmp_path / format, format, photo_rows(24), 3)
  _upload(store, folder, "bucket/data")
  local = Dataset(Source(str(folder), "train"))
  for run in (1, 5):
    remote = Dataset(Source("s3://bucket/data", "train"), run=run)
    assert remote.fingerprint == local.fingerprint
    assert [remote.read(n) for n in range(24)] == [local.read(n) for n in range(24)]
  assert len(Dataset(Source(f"s3://bucket/data/train-*.{format}"))) == 24
  assert len(Dataset(Source("s3://bucket/da*/train-00000*"))) == 8
  with pytest.raises(ValueError, match="no shards at s3://bucket/absent: no such file"):
    Dataset(Source("s3://bucket/absent"))


@pytest.mark.parametrize("format", ["tfrecord", "tar"])
@pytest.mark.parametrize("read_only", [False, True])
def test_indexes_are_cached_on_the_local_disk(store, tmp_path, format, read_only):
  folder = write_shards(tmp_path / format, format, photo_rows(24), 3)
  _upload(store, folder, "bucket/data")
  store.read_only = read_only
  Dataset(Source("s3://bucket/data", "train"))
  cached = list((tmp_path / "cache").iterdir())
  assert len(cached) == 3 and all(path.suffix == ".ovidx" for path in cached)
  assert sum(path.stat().st_size for path in cached) < 24 * 16 + 3 * 200  # no image byte
  assert sum(name.endswith(".ovidx") for name in store.objects) == (0 if read_only else 3)
  store.reset()
  Dataset(Source("s3://bucket/data", "train"))
  assert max(store.ranges) <= 64 << 10 and len(store.ranges) == 6  # both edges of each shard
  for path in cached:
    path.unlink()
  if not read_only:
    sidecars = [store.objects[n] for n in sorted(store.objects) if n.endswith(".ovidx")]
    assert all(sidecars)
    Dataset(Source("s3://bucket/data", "train"))  # from the sidecars in the bucket
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("format", _FORMATS)
def test_block_order_reads_ranges_and_no_byte_twice(store, tmp_path, format):
  rows = [{"jpg": np.random.default_rng(n).bytes(20_000), "txt": "a"} for n in range(256)]
  folder = write_shards(tmp_path / format, format, rows, 2)
  _upload(store, folder, "bucket/data")
  dataset = Dataset(Source("s3://bucket/data", "train"), run=64, cached_runs=4)
  store.reset()
  order = ov_data.Order((256,), shuffle="block", block=64, window=2)
  useful = sum(len(dataset.read(n, ["jpg"]).image) for n in order(np.arange(256)).record.tolist())
  assert useful == 256 * 20_000
  if format == "parquet":  # row groups of 7 rows
    assert np.median(store.ranges) > 6 * 20_000 and sum(store.ranges) < 1.2 * useful
  else:
    assert np.median(store.ranges) > 1e6 and sum(store.ranges) < 1.25 * useful
    assert len(store.ranges) <= 4 + 1


def test_file_functions(store):
  fs.write_atomic("s3://bucket/a/b.txt", b"x" * 100)
  assert store.objects == {"bucket/a/b.txt": b"x" * 100}
  assert fs.exists("s3://bucket/a/b.txt") and fs.size("s3://bucket/a/b.txt") == 100
  assert fs.is_dir("s3://bucket/a") and not fs.is_dir("s3://bucket/a/b.txt")
  assert fs.listdir("s3://bucket/a/") == ["b.txt"] and fs.read_bytes("s3://bucket/a/b.txt")
  status = fs.statuses(["s3://bucket/a/b.txt", "s3://bucket/a/c.txt"])
  assert status[0][0] == 100 and status[1] is None
  with pytest.raises(FileNotFoundError):
    fs.size("s3://bucket/absent")
  with pytest.raises(FileNotFoundError):
    fs.Reader("s3://bucket/absent")
  for number in range(2500):
    store.objects[f"bucket/many/{number:05d}"] = b""
  store.reset()
  assert len(fs.listdir("s3://bucket/many")) == 2500 and store.requests["LIST"] <= 4


def test_array_records_name_the_remedy(store):
  store.objects["bucket/a.array_record"] = b"x"
  with pytest.raises(ValueError, match="local folders only; mount the bucket"):
    Dataset(Source("s3://bucket/a.array_record"))
