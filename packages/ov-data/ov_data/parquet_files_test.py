"""Tests of Parquet files: columns, row groups, damage, and files that are not Parquet."""

import logging
from pathlib import Path
import sys

import numpy as np
import pytest

from ov_data import Dataset, Loader, Source, Tokenizer
from ov_data.records import RecordError
from ov_data.testing.shards import photo_rows, write_parquet

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def _open(path: Path, **arguments) -> Dataset:
  return Dataset(Source(str(path), **arguments))


def test_columns_of_every_type(tmp_path):
  rows = [
    {
      "image": {"bytes": b"photo", "path": "a.jpg"}, "caption": "a cat", "captions": ["a", "b"],
      "label": 3, "scores": [0.5, 1.5], "flag": True, "nothing": None,
    },
    {
      "image": None, "caption": None, "captions": [], "label": 4, "scores": None, "flag": False,
      "nothing": None,
    },
  ]  # fmt: skip
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
  found = _open(tmp_path, split="train", image_key="image", caption_keys=("caption", "captions"))
  record = found.read(0)
  assert record.image == b"photo" and record.texts["image/path"] == [b"a.jpg"]
  assert record.texts["caption"] == [b"a cat"] and record.texts["captions"] == [b"a", b"b"]
  assert record.labels["label"].tolist() == [3] and record.labels["flag"].tolist() == [1]
  np.testing.assert_array_equal(record.extra["scores"], np.array([0.5, 1.5], np.float32))
  assert found.read(1).image is None and "caption" not in found.read(1).texts
  some = found.read(0, ["image", "label"])
  assert some.texts.keys() == {"image"} and some.labels.keys() == {"label"} and not some.extra
  found.check_keys(["label", "image/path"])
  with pytest.raises(ValueError, match="feature 'jpg' is in none of the first 2 .* captions, flag"):
    _open(tmp_path).check_keys()


def test_rows_of_all_row_groups(tmp_path):
  for name, start in (("a", 0), ("b", 20)):
    rows = [{"jpg": b"%d" % n, "txt": f"{n}"} for n in range(start, start + 20)]
    write_parquet(tmp_path / f"{name}.parquet", rows, row_group_size=6)
  found = _open(tmp_path / "*.parquet", split="[3:38]")
  assert [found.read(n).image for n in range(35)] == [b"%d" % n for n in range(3, 38)]
  file, offset = found.locate(10)  # row 13
  metadata = parquet.read_metadata(tmp_path / "a.parquet")
  assert file.endswith("a.parquet")
  assert offset == metadata.row_group(2).column(0).dictionary_page_offset


def test_a_row_group_is_read_once_in_block_order(tmp_path, monkeypatch):
  write_parquet(tmp_path / "a.parquet", photo_rows(40), row_group_size=8)
  source = Source(str(tmp_path / "a.parquet"))
  tokenizer = Tokenizer.train(["a photo of 1"], 50)
  shared = dict(image_size=8, batch_size=8, tokenizer=tokenizer, text_len=8, seed=1)
  loader = Loader(source, shuffle="block", block=8, window=2, **shared)
  groups = loader.datasets[0]._records._groups
  read, load = [], groups._load
  monkeypatch.setattr(groups, "_load", lambda key: (read.append(key), load(key))[1])
  assert all(next(loader)["valid"].all() for _ in range(5))
  loader.close()
  per_group = [key[1] for key in read]
  assert sorted(per_group) == [2, 3, 4]  # opening the loader read the first 16 records
  assert {key[2] for key in read} == {("jpg", "txt")}


def test_only_requested_columns_are_read(tmp_path):
  rows = [{"jpg": b"x" * 1000, "txt": "a", "other": b"y" * 100_000} for _ in range(4)]
  write_parquet(tmp_path / "a.parquet", rows)
  records = _open(tmp_path / "a.parquet")._records
  sizes = []
  reader = records._reader(str(tmp_path / "a.parquet"))
  read = reader.read
  reader.read = lambda offset, length: sizes.append(length) or read(offset, length)
  records._footer(0)
  sizes.clear()
  assert records.read(2, ["jpg", "txt"]).image == b"x" * 1000
  assert sum(sizes) < 50_000


def test_huge_row_groups_in_random_order_are_reported(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr("ov_data.parquet_files._CACHED_BYTES", 1)
  write_parquet(tmp_path / "a.parquet", photo_rows(40), row_group_size=8)
  with caplog.at_level(logging.WARNING, "ov_data"):
    assert len(_open(tmp_path / "a.parquet")) == 40
  assert "use shuffle='block'" in caplog.text


def test_a_damaged_page_is_a_bad_record(tmp_path):
  path = tmp_path / "a.parquet"
  rng = np.random.default_rng(0)
  images = [rng.bytes(5000) for _ in range(12)]
  write_parquet(path, [{"jpg": image, "txt": "a"} for image in images])
  metadata = parquet.read_metadata(path)
  data = bytearray(path.read_bytes())
  column = metadata.row_group(1).column(0)
  middle = column.dictionary_page_offset + column.total_compressed_size // 3
  data[middle] ^= 0xFF
  path.write_bytes(data)
  found = _open(path)
  assert found.read(6).image == images[6]
  with pytest.raises(RecordError, match="damaged row group") as caught:
    found.read(7)
  assert caught.value.offset == found.locate(7)[1] > found.locate(6)[1]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>404</html>" * 99, b"PAR1" * 99])
def test_files_that_are_not_parquet_are_refused(tmp_path, content):
  (tmp_path / "a.parquet").write_bytes(content)
  with pytest.raises(
    ValueError, match=r"no usable record .*not a readable Parquet file\. Are they"
  ):
    _open(tmp_path / "a.parquet")
  write_parquet(tmp_path / "b.parquet", photo_rows(2))
  with pytest.raises(ValueError, match="1 of 2 shards have no usable record"):
    _open(tmp_path / "*.parquet")


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
  write_parquet(tmp_path / "a.parquet", photo_rows(2))
  for name in ("pyarrow", "pyarrow.parquet"):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ImportError, match=r"requires pyarrow.* pip install 'ov-data\[parquet\]'"):
    _open(tmp_path / "a.parquet")
