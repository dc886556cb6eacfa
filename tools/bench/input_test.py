"""Tests of the input benchmark: its images, its processes, and the batches that it counts."""

from pathlib import Path
import time

import pytest

from tools.bench import input as loading
from tools.bench import input_data
from tools.bench.input_data import BATCH, Kind

_KIND = Kind((64, 48), "JPEG", 2 * BATCH, 4)
_PX = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> input_data.Data:
  return input_data.Data(tmp_path_factory.mktemp("data"))


def test_a_pass_counts_every_image(data):
  found = loading._Passes(lambda: loading._open(data, _KIND, _PX))()
  assert found["images_per_cpu_s"] > 0 and found["images_per_s"] > 0
  loader = input_data.open_loader(data.of(_KIND), data.tokenizer, image_size=_PX, passes=1)
  batches = list(loader)
  assert sum(len(batch["image"]) for batch in batches) == _KIND.records
  assert batches[0]["image"].shape == (BATCH, _PX, _PX, 3)


@pytest.mark.parametrize("format", loading.FORMATS)
def test_every_format_has_the_same_batches(data, format):
  one_pass = loading._open(data, _KIND, _PX, format, **loading.BLOCKS)
  expected = loading._open(data, _KIND, _PX, "tfrecord", **loading.BLOCKS)
  for found, wanted in zip(one_pass(), expected(), strict=True):
    assert found["valid"].all() and (found["image"] == wanted["image"]).all()


def test_images_have_their_format_and_size():
  for kind, begin in {"JPEG": b"\xff\xd8", "WebP": b"RIFF", "PNG": b"\x89PNG"}.items():
    pictures = input_data.encoded(Kind((64, 48), kind, BATCH, 2))
    assert len(set(pictures)) == 2
    assert all(picture.startswith(begin) for picture in pictures)
  assert loading._decode_only(_KIND)["images_per_s"] > 0


def test_processes_load_their_rows(data):
  places = {"folder": str(data.of(_KIND)), "tokenizer": str(data.tokenizer), "image_size": _PX}
  arguments = [{**places, "rows": rows} for rows in [(0, 16), (16, BATCH)]]
  found, clock = loading.run(loading.one_pass, arguments)
  assert [one["images"] for one in found] == [2 * 16, 2 * (BATCH - 16)]
  assert clock > 0 and all(one["cpu_s"] > 0 and one["resident_mib"] > 1 for one in found)
  first = {**places, "started": time.time()}
  (found,), _ = loading.run(loading.first_batch, [first])
  assert found["cpu_s"] > 0 and 0 < found["clock_s"] < 100


def test_the_error_of_a_process_is_raised(data):
  places = {"folder": "nowhere", "tokenizer": str(data.tokenizer), "image_size": _PX, "started": 0}
  with pytest.raises(Exception, match="no shards at nowhere"):
    loading.run(loading.first_batch, [places])


def test_resuming(monkeypatch, tmp_path: Path):
  for module in (loading, input_data):
    monkeypatch.setattr(module, "TINY_RECORDS", 1000)
  data = input_data.Data(tmp_path)
  for shards in (3, 120):  # with a catalog
    found = loading._resume(data, shards)  # raises for any other row
    assert found["resident_mib"] > 1


def test_every_ratio_and_goal_has_a_row(tmp_path: Path):
  benchmark = loading.make(tmp_path)
  names = [case.name for case in benchmark.cases]
  assert len(set(names)) == len(names)
  assert benchmark.only(lambda _: True) == benchmark
  assert not any(tmp_path.iterdir())  # making the cases writes nothing
