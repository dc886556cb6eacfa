import io

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


def test_flipped_data_byte_costs_one_record():
  data, shard = _shard([10, 20, 30])
  damaged = bytearray(shard)
  damaged[26 + 12 + 5] ^= 1
  entries = list(records.scan(io.BytesIO(bytes(damaged))))
  assert [e.damage for e in entries] == [None, "data checksum", None]
  assert entries[1].offset == 26 + 12


def test_flipped_length_ends_the_scan():
  _, shard = _shard([10, 20, 30])
  damaged = bytearray(shard)
  damaged[26] ^= 1
  entries = list(records.scan(io.BytesIO(bytes(damaged))))
  assert [e.damage for e in entries] == [None, "length checksum"]


@pytest.mark.parametrize("cut, reason", [(3, "truncated record"), (40, "truncated header")])
def test_truncated_shard_keeps_what_is_whole(cut, reason):
  _, shard = _shard([10, 20, 30])
  entries = list(records.scan(io.BytesIO(shard[:-cut])))
  assert [e.damage for e in entries] == [None, None, reason]
