"""Tests that every format of shards gives the same batches, resumes exactly, and can be mixed."""

import json
from pathlib import Path

import numpy as np
import pytest

import ov_data
from ov_data.testing.shards import WRITERS, photo_rows, write_shards

_RECORDS, _SHARDS, _BATCH = 48, 3, 12
_ORDERS = (
  {"shuffle": "global"},
  {"shuffle": "block", "block": 8, "window": 2},
  {"shuffle": "none"},
)
_TOKENIZER = ov_data.Tokenizer.train([f"a photo of {n}" for n in range(_RECORDS)], 200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
  root = tmp_path_factory.mktemp("formats")
  rows = photo_rows(_RECORDS)
  return {format: write_shards(root / format, format, rows, _SHARDS) for format in WRITERS}


def _loader(*folders: Path, **arguments) -> ov_data.Loader:
  defaults = dict(image_size=16, batch_size=_BATCH, tokenizer=_TOKENIZER, text_len=8, seed=3)
  return ov_data.Loader(
    [ov_data.Source(str(folder)) for folder in folders], **{**defaults, **arguments}
  )


def _read(count: int, *folders: Path, **arguments) -> list[dict]:
  with _loader(*folders, **arguments) as batches:
    return [next(batches) for _ in range(count)]


def _assert_equal(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys() and a["valid"].all()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("order", _ORDERS, ids=lambda order: order["shuffle"])
@pytest.mark.parametrize("format", list(WRITERS)[1:])
def test_batches_equal_those_of_tfrecords(folders, format, order):
  expected = _read(10, folders["tfrecord"], **order)  # two and a half epochs
  assert len({batch["image"].tobytes() for batch in expected}) == 10
  _assert_equal(_read(10, folders[format], **order), expected)


@pytest.mark.parametrize("order", _ORDERS[:2], ids=lambda order: order["shuffle"])
@pytest.mark.parametrize("format", WRITERS)
def test_resuming_is_exact(folders, format, order):
  expected = _read(9, folders[format], **order)
  with _loader(folders[format], **order) as batches:
    for _ in range(5):
      next(batches)
    state = json.loads(json.dumps(batches.state()))
  with _loader(folders[format], **order) as resumed:
    resumed.restore(state)
    _assert_equal([next(resumed) for _ in range(4)], expected[5:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_mixture_of_all_formats_on_several_hosts(folders, hosts):
  order = {"shuffle": "block", "block": 4, "window": 2, "lanes": 4}
  expected = _read(8, *folders.values(), **order)
  size = _BATCH // hosts
  parts = [
    _read(8, *folders.values(), rows=slice(host * size, (host + 1) * size), **order)
    for host in range(hosts)
  ]
  joined = [
    {name: np.concatenate([part[n][name] for part in parts]) for name in expected[0]}
    for n in range(8)
  ]
  _assert_equal(joined, expected)


def test_slices_and_records_are_the_same(folders):
  for split in ("train[5:29]", "train[:50%][3:]", "train"):
    sets = {f: ov_data.Dataset(ov_data.Source(str(p), split)) for f, p in folders.items()}
    texts = {
      format: [found.read(n, ["txt"]).texts["txt"] for n in range(len(found))]
      for format, found in sets.items()
    }
    assert texts["tfrecord"][0] == ([b"a photo of 0"] if split == "train" else texts["tar"][0])
    assert all(found == texts["tfrecord"] for found in texts.values())
