import gzip
import io
import time
import zlib

import numpy as np
import pytest

from ov_data import records


def _shard(sizes):
  rng = np.random.default_rng(0)
  data = [rng.bytes(size) for size in sizes]
  return data, b"".join(map(records.frame, data))


def test_same_bytes_as_tensorflow(tmp_path):
  tf = pytest.importorskip("tensorflow")
  with tf.io.TFRecordWriter(str(tmp_path / "shard")) as writer:
    writer.write(b"abc")
    writer.write(b"")
  assert records.frame(b"abc") + records.frame(b"") == (tmp_path / "shard").read_bytes()


def test_scan_finds_every_record(monkeypatch):
  data, shard = _shard([0, 1, 12, 5000, 70000, 3])
  for chunk in (1, 13, 4096, 1 << 20):
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk)
    entries = list(records.scan(io.BytesIO(shard)))
    assert [e.damage for e in entries] == [None] * len(data)
    assert [shard[e.offset : e.offset + e.length] for e in entries] == data


def test_unframe():
  assert records.unframe(records.frame(b"hello")) == b"hello"
  with pytest.raises(records.RecordError, match="record at byte 7: truncated record"):
    records.unframe(records.frame(b"hello")[:-1], 7)


def test_flipped_data_byte_loses_one_record():
  data, shard = _shard([10, 20, 30])
  damaged = bytearray(shard)
  damaged[26 + 12 + 5] ^= 1
  entries = list(records.scan(io.BytesIO(bytes(damaged))))
  assert [e.damage for e in entries] == [None, "data checksum", None]
  assert entries[1].offset == 26 + 12


def _entries(shard):
  return list(records.scan(io.BytesIO(bytes(shard))))


def _sound(shard):
  shard = bytes(shard)
  return [shard[e.offset : e.offset + e.length] for e in _entries(shard) if e.damage is None]


def test_damaged_length_loses_one_record():
  data, shard = _shard([10, 20, 30])
  damaged = bytearray(shard)
  damaged[26] ^= 1
  entries = _entries(damaged)
  assert [e.damage for e in entries] == [None, "length checksum", None]
  assert (entries[1].offset, entries[1].length, entries[1].records) == (26, 36, None)
  assert _sound(damaged) == [data[0], data[2]]


@pytest.mark.parametrize("first, stop", [(26, 27), (0, 5), (300, 4500), (5000, 5001), (36, 90000)])
def test_only_records_that_damage_touches_are_lost(first, stop):
  data, shard = _shard([10, 0, 300, 5000, 70000, 3, 40])
  ends = np.cumsum([len(d) + 16 for d in data])
  damaged = bytearray(shard)
  damaged[first:stop] = bytes(b ^ 0x55 for b in damaged[first:stop])
  untouched = [d for d, end in zip(data, ends) if end <= first or end - len(d) - 16 >= stop]
  assert _sound(damaged) == untouched
  covered = [(e.offset, e.offset + e.length) for e in _entries(damaged) if e.damage]
  assert all(start < len(shard) and end <= len(shard) for start, end in covered)


@pytest.mark.parametrize("first, stop", [(30, 60), (38, 39), (70, 5400), (27, 28)])
def test_records_after_missing_bytes_are_found(first, stop):
  """After lost bytes, the damaged record extends into the following records."""
  data, shard = _shard([10, 40, 300, 5000, 30, 3])
  ends = np.cumsum([len(d) + 16 for d in data])
  untouched = [d for d, end in zip(data, ends) if end <= first or end - len(d) - 16 >= stop]
  assert _sound(shard[:first] + shard[stop:]) == untouched


def test_nothing_is_found_in_random_bytes_or_zeros():
  noise = np.random.default_rng(1).bytes(3 << 20)
  for shard in (noise, bytes(1 << 20), b"\xff" * 1000):
    assert _sound(shard) == []
    assert [e.damage for e in _entries(shard)] == ["length checksum"]


@pytest.mark.parametrize("length", [0, 1 << 19, 1 << 29])
def test_work_on_crafted_headers_is_bounded(length):
  """Every 12 bytes are a valid header, for which a naive search takes quadratic time."""
  header = records.frame(bytes(length))[:12] if length < 1 << 20 else None
  if header is None:
    packed = length.to_bytes(8, "little")
    header = packed + records.masked_crc32c(packed).to_bytes(4, "little")
  shard = b"\1" + header * (1 << 17)
  start = time.process_time()
  assert _sound(shard) == []
  assert time.process_time() - start < 10  # 0.1 to 1 s; quadratic work takes minutes


def test_many_damaged_stretches_are_bounded():
  shard = (records.frame(b"x" * 30) + b"\1" * 12) * 30_000
  start = time.process_time()
  assert len(_sound(shard)) == 10_001  # limited by the number of searches; the rest is one range
  assert time.process_time() - start < 20


@pytest.mark.parametrize(
  "head, reason",
  [
    (gzip.compress(b"x" * 99), "gzip-compressed shard"),
    (zlib.compress(b"x" * 99), "zlib-compressed shard"),
    (b"<html>404 Not Found</html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    (b"\x78\x9c" + b"\xff" * 20, "length checksum"),  # zlib signature without zlib data
    (b"something else", "length checksum"),
  ],
)
def test_other_content_is_named(head, reason):
  assert [e.damage for e in _entries(head)] == [reason]


@pytest.mark.parametrize("cut, reason", [(3, "truncated record"), (40, "truncated header")])
def test_truncated_shard_keeps_complete_records(cut, reason):
  _, shard = _shard([10, 20, 30])
  entries = list(records.scan(io.BytesIO(shard[:-cut])))
  assert [e.damage for e in entries] == [None, None, reason]
