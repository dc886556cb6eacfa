import io
import itertools
import json
import time

import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from ov_data import keep_list, shard_files
from ov_data.keep_list import KeepList
from ov_data.loader import Loader
from ov_data.sources import Dataset, Source
from ov_data.writer import ShardWriter

REASON = "too small"


class Numbers:
  """Fake tokenizer; the token id is 10 + the number in the text."""

  pad_id = 0

  def encode_batch(self, texts, length):
    ids = np.array([[10 + int(text)] * length for text in texts], np.int32)
    return ids.reshape(len(texts), length), np.ones((len(texts), length), bool)


def _jpeg():
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
  return buffer.getvalue()


def _write(folder, shards, first=0):
  """Write shards; the caption of each record is its number."""
  folder.mkdir()
  image, number = _jpeg(), first
  for shard, count in enumerate(shards):
    with ShardWriter(str(folder / f"{shard}.tfrecord")) as writer:
      for _ in range(count):
        writer.write({"jpg": image, "txt": str(number)})
        number += 1
  return Source(str(folder))


def _keep(path, source, kept):
  """Write a keep-list of the records `kept`, and return the source with it."""
  dataset = Dataset(source)
  mask = np.zeros(len(dataset), bool)
  mask[list(kept)] = True
  dropped = {REASON: int((~mask).sum())}
  KeepList(keep_list.identity(dataset), mask, dropped).write(str(path))
  return Source(source.path, keep_list=str(path))


def _loader(source, **arguments):
  defaults = dict(image_size=8, batch_size=8, tokenizer=Numbers(), text_len=1, threads=2)
  return Loader(source, **{**defaults, **arguments})


def _numbers(batches, count):
  return [int(ids[0]) - 10 for batch in itertools.islice(batches, count) for ids in batch["ids"]]


@pytest.fixture
def data(tmp_path):
  return _write(tmp_path / "d", (30, 0, 13, 21))


@pytest.mark.parametrize("records", [1, 2, 511, 512, 513, 1024, 20_000])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 1.0])
def test_look_ups_equal_those_of_a_list(records, fraction):
  mask = np.random.default_rng(records).random(records) < fraction
  mask[records // 2] = True
  keep = KeepList("", mask, {REASON: int((~mask).sum())})
  expected = np.flatnonzero(mask).tolist()
  assert len(keep) == len(expected) and list(keep) == expected
  assert [keep.rank(record) for record in expected] == list(range(len(expected)))
  np.testing.assert_array_equal(keep.kept, mask)
  if not mask.all():
    with pytest.raises(ValueError, match="is dropped by the keep-list"):
      keep.rank(int(np.flatnonzero(~mask)[0]))


def test_ten_million_records(tmp_path):
  records = 10_000_000
  random = np.random.default_rng(0)
  mask = random.random(records) < 0.3
  KeepList("", mask, {REASON: int((~mask).sum())}).write(str(tmp_path / "keep"))
  assert (tmp_path / "keep").stat().st_size < records / 8 + 1024
  keep = KeepList.read(str(tmp_path / "keep"))
  # One bit per record, and 64 bits for each 512 records, up to the last block.
  assert keep.nbytes <= (1 + 64 / 512) * records / 8 + 128
  expected = np.flatnonzero(mask)
  numbers = random.integers(len(expected), size=20_000).tolist()
  start = time.process_time()
  found = [keep[number] for number in numbers]
  seconds = (time.process_time() - start) / len(numbers)
  np.testing.assert_array_equal(found, expected[numbers])
  assert [keep.rank(record) for record in found] == numbers
  # Measured 3 to 5 CPU us; a search through all records takes milliseconds.
  assert seconds < 100e-6


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_an_epoch_has_each_kept_record_once(tmp_path, data, shuffle):
  kept = [0, 1, 5, 6, 7, 29, 30, 31, 42, 43, 44, 50, 61, 62, 63]
  source = _keep(tmp_path / "keep", data, kept)
  with _loader(source, shuffle=shuffle, block=4, window=2, batch_size=5) as batches:
    assert batches.num_examples == len(kept)
    for _ in range(3):
      assert sorted(_numbers(batches, 3)) == kept
    assert batches.epochs == (3.0,)
    assert batches.dropped == {REASON: 64 - len(kept)} and not batches.damaged


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_hosts_and_resume(tmp_path, data, shuffle):
  source = _keep(tmp_path / "keep", data, range(0, 64, 3))
  order = dict(shuffle=shuffle, block=4, window=1, lanes=2, seed=1)
  with _loader(source, **order) as batches:
    expected = [_numbers(batches, 1) for _ in range(8)]
  for hosts in (2, 4):
    rows = 8 // hosts
    parts = []
    for host in range(hosts):
      mine = slice(host * rows, (host + 1) * rows)
      with _loader(source, rows=mine, **order) as batches:
        found = [_numbers(batches, 1) for _ in range(3)]
        state = json.loads(json.dumps(batches.state()))
      with _loader(source, rows=mine, **order) as batches:
        batches.restore(state)
        parts.append(found + [_numbers(batches, 1) for _ in range(5)])
      assert state["position"] == 24
    assert [sum(step, []) for step in zip(*parts)] == expected


def test_mixtures_have_one_keep_list_per_source(tmp_path, data):
  other = _write(tmp_path / "e", (20,), first=100)
  kept = [*range(0, 64, 4)]
  one = _keep(tmp_path / "keep", data, kept)
  with _loader([one, other], batch_size=4) as batches:  # 16 of 64, and all 20
    numbers = _numbers(batches, 8)  # half of them from each source
    assert sorted(n for n in numbers if n < 100) == kept
    assert len({n for n in numbers if n >= 100}) == 16
    assert batches.dropped == {REASON: 48}


def test_another_keep_list_does_not_resume(tmp_path, data):
  source = _keep(tmp_path / "keep", data, range(32))
  with _loader(source) as batches:
    state = batches.state()
  for other in (data, _keep(tmp_path / "other", data, range(1, 33))):
    with _loader(other) as batches, pytest.raises(ValueError, match="saved with fingerprint=") as e:
      batches.restore(state)
    assert "keep-lists" in str(e.value) and "\n" not in str(e.value)
  (tmp_path / "moved").write_bytes((tmp_path / "keep").read_bytes())
  with _loader(Source(data.path, keep_list=str(tmp_path / "moved"))) as batches:
    batches.restore(state)


def test_keep_lists_of_other_sources_are_rejected(tmp_path, data):
  path = str(_keep(tmp_path / "keep", data, range(32)).keep_list)
  other = _write(tmp_path / "e", (20,))
  for source, problem in (
    (Source(other.path, keep_list=path), "for a source of 64 records, and this one has 20"),
    (Source(_write(tmp_path / "f", (30, 34)).path, keep_list=path), "is for the source"),
  ):
    with pytest.raises(ValueError, match=problem) as error:
      Dataset(source)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_slices_of_equal_size_are_other_sources(tmp_path, data):
  half = Source(str(tmp_path / "d" / "0.tfrecord"), split="[:15]")
  path = _keep(tmp_path / "keep", half, [0]).keep_list
  assert len(Dataset(Source(half.path, split="[:15]", keep_list=path))) == 1
  with pytest.raises(ValueError, match="is for the source"):
    Dataset(Source(half.path, split="[15:]", keep_list=path))


def test_damage_is_found_before_the_data_are_opened(tmp_path, data, monkeypatch):
  source = _keep(tmp_path / "keep", data, range(32))
  good = (tmp_path / "keep").read_bytes()
  monkeypatch.setattr("ov_data.formats.open_records", lambda _: pytest.fail("opened"))
  line = good.index(b"\n")
  damaged = [good[:-1], good[:line], good[: line + 1], b"", b"{}\n", good + b"\0", good[::-1]]
  damaged.append(good.replace(b'"too small": 32', b'"too small": 33'))
  damaged.append(good.replace(b'"too small": 32', b'"too large": 32'))
  damaged.append(good.replace(b'"records": 64', b'"records": 65'))
  for at in range(0, 8 * len(good), 37):  # every 37th bit
    flipped = bytearray(good)
    flipped[at // 8] ^= 1 << at % 8
    damaged.append(bytes(flipped))
  for content in damaged:
    (tmp_path / "keep").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a usable keep-list .*; copy it again") as error:
      Dataset(source)
    assert "\n" not in str(error.value)
  (tmp_path / "keep").unlink()
  with pytest.raises(ValueError, match="there is no such file"):
    Dataset(source)


def test_counts_must_match():
  with pytest.raises(ValueError, match=r"1 kept and 2 dropped records, but the source has 2"):
    KeepList("", np.array([True, False]), {REASON: 2})
  with pytest.raises(ValueError, match=r"all 2 records are dropped \(2 too small\)"):
    KeepList("", np.array([False, False]), {REASON: 2})


def test_block_order_reads_runs_of_kept_records(tmp_path, monkeypatch):
  """Runs contain kept records only, and long gaps between them are not read."""
  data = _write(tmp_path / "d", (300, 300))
  kept = [*range(0, 100, 2), *range(200, 400, 50), *range(500, 600)]
  source = _keep(tmp_path / "keep", data, kept)
  reads = []
  fetch = shard_files.ShardRuns._fetch
  monkeypatch.setattr(
    shard_files.ShardRuns,
    "_fetch",
    lambda self, shard, first, stop: (
      reads.append((300 * shard + first, 300 * shard + stop)) or fetch(self, shard, first, stop)
    ),
  )
  dataset = Dataset(source, run=50)
  assert [int(dataset.read(n).texts["txt"][0]) for n in range(len(dataset))] == kept
  # The first probes read nothing twice: each run is fetched once.
  expected = [(0, 99), (200, 201), (250, 251), (300, 301), (350, 351), (500, 546)]
  assert reads == [*expected, (546, 596), (596, 600)]


def test_parquet_in_block_order(tmp_path):
  table = pa.table({"jpg": [_jpeg()] * 60, "txt": [str(n) for n in range(60)]})
  parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
  kept = [0, 8, 9, 30, 31, 59]
  source = _keep(tmp_path / "keep", Source(str(tmp_path / "a.parquet")), kept)
  with _loader(source, shuffle="block", block=2, window=2, batch_size=3) as batches:
    assert sorted(_numbers(batches, 2)) == kept
