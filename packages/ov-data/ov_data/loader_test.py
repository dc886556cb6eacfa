import errno
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import threading

import numpy as np
from PIL import Image
import pytest

from ov_data import bad_records, decode, example, records
from ov_data.loader import Loader
from ov_data.sources import Dataset, Source


class Words:
  """Fake tokenizer; the token id is 10 + the number in the text."""

  pad_id = 0

  def encode_batch(self, texts, length):
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
      numbers = [10 + int(word) for word in text.split()][:length]
      ids[row, : len(numbers)] = numbers
    return ids, ids != 0


def _jpeg(number, size=(24, 20)):
  image = np.full((size[1], size[0], 3), number % 256, np.uint8)
  image[::2] //= 2
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "JPEG", quality=95)
  return buffer.getvalue()


def _write(path, numbers, replace=None):
  """Write a shard; the caption of each record is its number."""
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with open(path, "wb") as file:
    for number in numbers:
      features = {"jpg": _jpeg(number), "txt": str(number), "label": number}
      features.update((replace or {}).get(number, {}))
      file.write(records.frame(example.serialise({k: v for k, v in features.items() if v != ""})))


@pytest.fixture
def data(tmp_path):
  for shard in range(3):
    _write(tmp_path / "d" / f"{shard}.tfrecord", range(10 * shard, 10 * shard + 10))
  return Source(str(tmp_path / "d"))


def _loader(source, **arguments):
  defaults = dict(image_size=8, batch_size=8, tokenizer=Words(), text_len=4, threads=2)
  return Loader(source, **{**defaults, **arguments})


def _numbers(batches):
  return [int(ids[0]) - 10 for batch in batches for ids in batch["ids"]]


def _take(batches, count):
  return [next(batches) for _ in range(count)]


def _assert_equal(batch, other):
  assert batch.keys() == other.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], other[key])


def test_a_batch(data):
  with _loader(data, shuffle="none", extra_keys=("label",)) as batches:
    batch = next(batches)
  assert batch["image"].shape == (8, 8, 8, 3) and batch["image"].dtype == np.uint8
  assert batch["ids"].shape == (8, 4) and batch["ids"].dtype == np.int32
  assert batch["mask"].dtype == bool and batch["valid"].all()
  np.testing.assert_array_equal(batch["index"], np.arange(8))
  np.testing.assert_array_equal(batch["ids"][:, 0], np.arange(10, 18))
  np.testing.assert_array_equal(batch["mask"], [[True, False, False, False]] * 8)
  assert batch["label"] == list(range(8))
  assert batch["image"][7].mean() > batch["image"][1].mean()


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_epochs_are_complete_and_contiguous(data, shuffle):
  with _loader(data, shuffle=shuffle, block=4, window=2) as batches:
    numbers = _numbers(_take(batches, 15))
    assert batches.epochs == (4.0,)
  for epoch in range(4):
    assert sorted(numbers[30 * epoch : 30 * epoch + 30]) == list(range(30))


def test_same_seed_same_batches_independent_of_the_threads(data):
  with (
    _loader(data, seed=3, threads=1, prefetch=0) as one,
    _loader(data, seed=3, threads=5, prefetch=4) as other,
  ):
    for _ in range(6):
      _assert_equal(next(one), next(other))
  with _loader(data, seed=4) as other:
    assert _numbers([next(other)]) != _numbers(_take(_loader(data, seed=3), 1))


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_hosts_split_the_global_batch(data, shuffle):
  order = dict(shuffle=shuffle, block=4, window=2, lanes=4, seed=1)
  with _loader(data, **order) as whole:
    expected = _take(whole, 6)
  for hosts in (2, 4):
    rows = 8 // hosts
    parts = []
    for host in range(hosts):
      with _loader(data, rows=slice(host * rows, (host + 1) * rows), **order) as part:
        parts.append(_take(part, 6))
    for step in range(6):
      joined = {key: np.concatenate([part[step][key] for part in parts]) for key in expected[step]}
      _assert_equal(joined, expected[step])


def test_resume_is_exact_and_counts_returned_rows_only(data):
  with _loader(data, prefetch=3) as batches:
    _take(batches, 2)
    state = json.loads(json.dumps(batches.state()))
    expected = _take(batches, 6)
  assert state["position"] == 16
  with _loader(data, position=16, prefetch=0) as batches:
    for batch in expected:
      _assert_equal(next(batches), batch)
  with _loader(data) as batches:
    next(batches)
    batches.restore(state)  # also with pending batches
    for batch in expected:
      _assert_equal(next(batches), batch)


def test_resume_on_another_number_of_hosts(data):
  with _loader(data) as batches:
    _take(batches, 2)
    state = batches.state()
    expected = next(batches)
  with _loader(data, rows=slice(4, 8)) as batches:
    batches.restore(state)
    np.testing.assert_array_equal(next(batches)["ids"], expected["ids"][4:])


def test_resume_rejects_other_data_or_order(data, tmp_path):
  with _loader(data) as batches:
    state = batches.state()
  with _loader(data, seed=1) as batches, pytest.raises(ValueError, match="seed=0, and now seed=1"):
    batches.restore(state)
  with _loader(data, shuffle="none") as batches, pytest.raises(ValueError, match="shuffle=global"):
    batches.restore(state)
  _write(tmp_path / "d" / "3.tfrecord", range(3))
  with _loader(data) as batches, pytest.raises(ValueError, match="fingerprint"):
    batches.restore(state)


def test_mixture(data, tmp_path):
  _write(tmp_path / "small" / "0.tfrecord", range(100, 105))
  small = Source(str(tmp_path / "small"), weight=1.0)
  large = Source(data.path, weight=3.0)
  with _loader([large, small]) as batches:
    numbers = _numbers(_take(batches, 5))
    assert batches.epochs == (1.0, 2.0)
    assert batches.num_examples == 35
    shard, _ = batches.locate(2)  # the pattern of 3 : 1 is large, large, small, large
  assert sum(number >= 100 for number in numbers) == 10
  assert sorted(number for number in numbers if number < 100) == list(range(30))
  assert "small" in shard or "/d/" in shard


def test_evaluation_is_one_padded_pass(data):
  with Loader.evaluation(
    data, image_size=8, batch_size=8, tokenizer=Words(), text_len=4, extra_keys=("label",)
  ) as batches:
    assert batches.num_batches == 4
    for _ in range(2):  # each loop restarts
      found = list(batches)
      assert [batch["valid"].sum() for batch in found] == [8, 8, 8, 6]
      last = found[-1]
      assert last["image"].shape == (8, 8, 8, 3)
      assert not last["image"][6:].any() and not last["mask"][6:].any()
      assert last["index"].tolist() == [24, 25, 26, 27, 28, 29, -1, -1]
      assert last["label"] == [24, 25, 26, 27, 28, 29, None, None]
      assert _numbers(found)[:30] == list(range(30))


def test_evaluation_gives_every_host_the_same_number_of_batches(data):
  # 30 examples in batches of 28: the last batch has 2 examples, both on the first host.
  for host, valid in enumerate(([14, 2], [14, 0])):
    with Loader.evaluation(
      data, image_size=8, batch_size=28, rows=slice(14 * host, 14 * host + 14),
      tokenizer=Words(), text_len=4,
    ) as batches:  # fmt: skip
      assert [int(batch["valid"].sum()) for batch in batches] == valid


BROKEN = {
  2: dict(jpg=b"\xff\xd8 nothing"),
  5: dict(txt=""),
  9: dict(jpg=""),
  11: dict(jpg=_jpeg(1)[:-200]),
}


def _break(tmp_path):
  _write(tmp_path / "b" / "0.tfrecord", range(16), BROKEN)
  return Source(str(tmp_path / "b"))


def test_broken_records_keep_their_rows(tmp_path, caplog):
  source = _break(tmp_path)
  with _loader(source, shuffle="none", extra_keys=("label",), max_bad_fraction=0.5) as batches:
    first, second = _take(batches, 2)
    assert batches.skipped == {
      "unknown format": 1, "no caption under txt": 1, "no image under jpg": 1, "truncated image": 1,
    }  # fmt: skip
    shard, offset = batches.locate(5)
    state = batches.state()
  np.testing.assert_array_equal(np.flatnonzero(~first["valid"]), [2, 5])
  np.testing.assert_array_equal(np.flatnonzero(~second["valid"]), [1, 3])
  assert not first["image"][[2, 5]].any() and not first["mask"][[2, 5]].any()
  assert (first["ids"][[2, 5]] == 0).all() and first["label"][5] is None
  assert first["index"].tolist() == list(range(8))
  assert f"skipped {shard} at byte {offset} (1 so far): no caption under txt" in caplog.text
  with _loader(source, shuffle="none", max_bad_fraction=0.5) as batches:
    batches.restore(state)
    assert sum(batches.skipped.values()) == 4


def test_too_many_broken_records_stop_the_run(tmp_path):
  numbers = range(600)
  _write(
    tmp_path / "b" / "0.tfrecord",
    numbers,
    {n: dict(jpg=b"no image") for n in numbers if n % 5 == 0},
  )
  with _loader(Source(str(tmp_path / "b")), batch_size=40, max_bad_fraction=0.1) as batches:
    with pytest.raises(
      bad_records.TooManyBadRecords, match=r"more than max_bad_fraction=0.1 .* x unknown"
    ):
      _take(batches, 15)
    assert batches.position <= 240  # limit: 20 of the first 200
  with _loader(Source(str(tmp_path / "b")), batch_size=40, max_bad_fraction=0.25) as batches:
    assert len(_take(batches, 15)) == 15


def test_damage_in_shards_is_counted(data, tmp_path):
  path = tmp_path / "d" / "2.tfrecord"
  path.write_bytes(path.read_bytes()[:-3])
  with _loader(data) as batches:
    assert batches.damaged == {"truncated record": 1}
    assert batches.num_examples == 29


def test_captions_are_sampled_from_keys_and_strings(tmp_path):
  _write(
    tmp_path / "c" / "0.tfrecord",
    range(64),
    {n: dict(txt=["1", " ", "2"], long=["3", "4", "5"]) for n in range(64)},
  )
  source = Source(str(tmp_path / "c"), caption_keys=("txt", "long"))
  with _loader(source, batch_size=64, seed=1) as batches:
    counts = np.zeros(6)
    for batch in _take(batches, 10):
      counts += np.bincount(batch["ids"][:, 0] - 10, minlength=6)
  # 640 samples: 1/4 for each of txt, 1/6 for each of long; 5 standard deviations are below 55.
  np.testing.assert_allclose(counts, [0, 160, 160, 107, 107, 107], atol=55)
  with _loader(source, batch_size=64, captions="first") as batches:
    assert (next(batches)["ids"][:, 0] == 11).all()


def test_no_captions_wanted(data):
  with _loader(Source(data.path, caption_keys=())) as batches:
    batch = next(batches)
  assert batch["valid"].all() and not batch["mask"].any()


def test_misspelt_keys_fail_at_once(data):
  with pytest.raises(
    ValueError, match="'png' is in none of the first 16 records .* jpg, label, txt"
  ):
    _loader(Source(data.path, image_key="png"))
  with pytest.raises(ValueError, match="'attributes' is in none"):
    _loader(data, extra_keys=("attributes",))
  with pytest.raises(ValueError, match="'label' holds numbers in the first 16 records"):
    _loader(Source(data.path, caption_keys=("txt", "label")))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(batch_size=0), "batch_size=0"),
    (dict(image_size=-1), "image_size=-1"),
    (dict(rows=slice(4, 20)), "slice of the 8 rows"),
    (dict(position=-8), "position=-8"),
    (dict(fit="pad"), "fit='pad'"),
    (dict(captions="some"), "captions='some'"),
    (dict(text_len=None), "text_len=None"),
    (dict(text_len=0), "text_len=0: expected the tokens"),
    (dict(seed=2**70), f"seed={2**70}: expected a 64-bit integer"),
    (dict(max_bad_fraction=-0.1), "max_bad_fraction=-0.1: expected a fraction from 0 to 1"),
    (dict(max_bad_fraction=float("nan")), "max_bad_fraction=nan"),
    (dict(shuffle="full"), "shuffle='full'"),
    (dict(lanes=3), "not a multiple of lanes=3"),
    (dict(extra_keys=("image",)), "reserved names of the batch"),
  ],
)
def test_argument_errors(data, arguments, message):
  with pytest.raises(ValueError, match=message):
    _loader(data, **arguments)


def test_passes_need_one_source(data):
  with pytest.raises(ValueError, match="over 2 sources"):
    _loader([data, data], passes=1)


class _Panic(BaseException):
  """Panic of a Rust library."""


@pytest.mark.parametrize("error", [struct.error("odd"), RecursionError(), _Panic("panicked")])
@pytest.mark.parametrize("where", ["decode", "tokenize"])
def test_any_exception_loses_one_record(data, error, where, monkeypatch, caplog):
  whole, encode = decode.whole, Words.encode_batch

  def fails_on_5(image, *arguments):
    if image == _jpeg(5):
      raise error
    return whole(image, *arguments)

  def fails_on_word_5(self, texts, length):
    if "5" in texts:
      raise error
    return encode(self, texts, length)

  with _loader(data, shuffle="none", passes=1, fit="center") as batches:
    want = next(batches)
  if where == "decode":
    monkeypatch.setattr(decode, "whole", fails_on_5)
  else:
    monkeypatch.setattr(Words, "encode_batch", fails_on_word_5)
  with _loader(data, shuffle="none", passes=1, fit="center") as batches:
    for _ in range(2):  # the second pass restarts the count and logs no traceback
      got = [*batches][0]
      assert batches.skipped == {f"unexpected {type(error).__name__}": 1}
    shard, offset = batches.locate(5)
  assert got["valid"].tolist() == [n != 5 for n in range(8)]
  for key in ("image", "ids", "mask"):
    blank = np.zeros_like(want[key][5])
    np.testing.assert_array_equal(got[key], [*want[key][:5], blank, *want[key][6:]])
  tracebacks = [record for record in caplog.records if record.exc_info]
  assert [record.exc_info[1] for record in tracebacks] == [error]
  assert f"{shard} at byte {offset}" in tracebacks[0].message


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_a_bug_that_hits_every_record_ends_the_run(data, fraction, monkeypatch):
  monkeypatch.setattr(decode, "random_crop", _raise_runtime_error)
  expected = pytest.raises(bad_records.TooManyBadRecords, match="x unexpected RuntimeError")
  with _loader(data, max_bad_fraction=fraction) as batches, expected:
    _take(batches, 8)
  assert not [thread for thread in threading.enumerate() if thread.name.startswith("ov-data")]


def _raise_runtime_error(*_):
  raise RuntimeError("out of order")


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), OSError(errno.EMFILE, "x")])
def test_failures_of_the_process_reach_the_caller(data, error, monkeypatch):
  def fail(*_):
    raise error

  monkeypatch.setattr(decode, "random_crop", fail)
  with _loader(data) as batches, pytest.raises(type(error)):
    next(batches)


def test_an_unreadable_file_loses_one_record(data, monkeypatch):
  read = Dataset.read

  def fails_on_3(self, record, keys=None):
    if record == 3:
      raise OSError(errno.EIO, "Input/output error")
    return read(self, record, keys)

  with _loader(data, shuffle="none") as batches:
    monkeypatch.setattr(Dataset, "read", fails_on_3)
    assert next(batches)["valid"].tolist() == [n != 3 for n in range(8)]
    assert batches.skipped == {"unreadable file": 1}


def test_a_vanished_shard_is_an_error_not_a_bad_record(data, tmp_path):
  with _loader(data, shuffle="none", position=24) as batches:
    (tmp_path / "d" / "2.tfrecord").unlink()
    with pytest.raises(FileNotFoundError):
      _take(batches, 3)


def test_waiting_is_measured(data):
  with _loader(data) as batches:
    next(batches)
    assert 0 < batches.wait_seconds < 60


def test_importing_needs_no_heavy_library():
  code = (
    "import sys, ov_data\n"
    "from ov_data import decode, example, index, loader, order, records, sources\n"
    "heavy = {'tensorflow', 'tensorflow_datasets', 'jax', 'torch', 'absl'} & set(sys.modules)\n"
    "assert not heavy, heavy"
  )
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  subprocess.run([sys.executable, "-c", code], check=True, env=environment)
