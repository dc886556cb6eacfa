"""Shards that do not match their manifest: replaced, swapped, copied, renamed."""

import os
import pathlib
import shutil

import pytest

from ov_data import shards, writer
from ov_data.request import Request, Source
from ov_data.shard_names import find_shards
from ov_data.splits import Split


def _make(split: str, number: int):
  for i in range(3):
    yield {"txt": f"{split} {number} {i}"}  # equal size in every shard


def _make_longer(split: str, number: int):
  for i in range(3):
    yield {"txt": f"{split} {number} {i}, and more"}


def _data(folder: pathlib.Path, make=_make) -> pathlib.Path:
  writer.write_dataset(folder, {"train": 2}, make, {}, workers=0)
  return folder


def _name(number: int) -> str:
  return f"train-{number:05d}-of-00002.tfrecord"


def _open(folder: pathlib.Path) -> shards.Shards:
  return shards.Shards(Request(Source(str(folder)), Split("train")))


def test_a_shard_of_another_data_set(tmp_path):
  data, other = _data(tmp_path / "a"), _data(tmp_path / "b", _make_longer)
  assert len(_open(data)) == 6
  shutil.copy(other / _name(1), data)
  with pytest.raises(ValueError, match=rf"{_name(1)} has \d+ bytes, not \d+\. Copy these shards"):
    _open(data)
  (data / "dataset.json").unlink()
  assert len(_open(data)) == 6


@pytest.mark.parametrize("exchange", [False, True])
def test_a_shard_of_the_same_size(tmp_path, exchange):
  data = _data(tmp_path)
  if exchange:
    os.rename(data / _name(0), data / "0")
    os.rename(data / _name(1), data / _name(0))
    os.rename(data / "0", data / _name(1))
  else:
    shutil.copy(data / _name(0), data / _name(1))
  with pytest.raises(ValueError, match="split 'train' are not the written ones.*or by a copy"):
    _open(data)


def test_a_number_outside_of_the_set(tmp_path):
  data = _data(tmp_path)
  shutil.copy(data / _name(0), data / _name(2))
  with pytest.raises(
    ValueError, match=f"{_name(2)}: shards are numbered from 0.*not one of 2; remove"
  ):
    find_shards(str(data))
  with pytest.raises(
    ValueError, match=f"2 shards, numbered from 0, and {_name(2)} is not one of them"
  ):
    shards.Shards(Request(Source(str(data / _name(2))), Split(None)))


def test_an_index_without_its_shard_is_not_a_shard(tmp_path):
  data = _data(tmp_path)
  for number in range(2):
    (data / _name(number)).unlink()
  with pytest.raises(ValueError, match=r"no \*.tfrecord\* file of split 'train' in it$"):
    _open(data)


def test_a_shard_that_the_manifest_does_not_list(tmp_path):
  data = _data(tmp_path)
  shutil.copy(data / _name(0), data / "train-copy.tfrecord")
  with pytest.raises(
    ValueError, match=r"train-copy\.tfrecord next to them is not one of them; move"
  ):
    _open(data)
  assert len(shards.Shards(Request(Source(f"{data}/train-0*"), Split(None)))) == 6
  assert len(shards.Shards(Request(Source(f"{data}/train-copy.tfrecord"), Split(None)))) == 3
