import json
import os
import pathlib

import numpy as np
import pytest

from ov_data import fs, index, records


def _write(path, count=5, seed=0):
  rng = np.random.default_rng(seed)
  data = [rng.bytes(100 + 10 * number) for number in range(count)]
  pathlib.Path(path).write_bytes(b"".join(map(records.frame, data)))
  return data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
  """How often a shard was scanned."""
  paths = []
  build = index._build
  monkeypatch.setattr(index, "_build", lambda path, *a: (paths.append(path), build(path, *a))[1])
  return paths


def test_offsets_and_lengths(tmp_path):
  path = str(tmp_path / "a.tfrecord")
  data = _write(path)
  found = index.load_index(path)
  raw = pathlib.Path(path).read_bytes()
  assert [raw[o : o + n] for o, n in zip(found.offsets, found.lengths)] == data
  assert len(found) == 5 and found.damage == () and found.size == len(raw)


def test_built_once_and_again_when_the_shard_changes(tmp_path, builds):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  first = index.load_index(path)
  again = index.load_index(path)
  assert len(builds) == 1 and os.path.exists(path + ".ovidx")
  np.testing.assert_array_equal(first.offsets, again.offsets)
  np.testing.assert_array_equal(first.lengths, again.lengths)
  _write(path, seed=1)  # same size, other bytes
  index.load_index(path)
  _write(path, count=6)
  assert len(index.load_index(path)) == 6
  assert len(builds) == 3


def test_survives_copying(tmp_path, builds):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  index.load_index(path)
  (tmp_path / "copy").mkdir()
  for name in ("a.tfrecord", "a.tfrecord.ovidx"):
    (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
  copied = index.load_index(str(tmp_path / "copy" / "a.tfrecord"))
  assert len(builds) == 1 and copied.path.endswith("copy/a.tfrecord")


@pytest.mark.parametrize("damage", ["flip", "cut", "format", "empty"])
def test_a_broken_sidecar_is_replaced(tmp_path, builds, damage):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  index.load_index(path)
  sidecar = pathlib.Path(path + ".ovidx")
  whole = sidecar.read_bytes()
  broken = {
    "flip": whole[:-1] + bytes([whole[-1] ^ 1]),
    "cut": whole[:-5],
    "format": whole.replace(b"index 1", b"index 0"),
    "empty": b"",
  }[damage]
  sidecar.write_bytes(broken)
  assert len(index.load_index(path)) == 5
  assert len(builds) == 2 and sidecar.read_bytes() == whole


def test_read_only_directory_uses_the_cache(tmp_path, builds, cache, monkeypatch):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  write = fs.write_atomic

  def refuse(target, data):
    if target.startswith(path):
      raise PermissionError(target)
    write(target, data)

  monkeypatch.setattr(fs, "write_atomic", refuse)
  index.load_index(path)
  index.load_index(path)
  assert len(builds) == 1 and len(list(cache.iterdir())) == 1


def test_damage_is_reported_and_the_rest_is_usable(tmp_path, caplog):
  good, flipped, cut = (str(tmp_path / f"{name}.tfrecord") for name in ("good", "flipped", "cut"))
  _write(good)
  data = _write(flipped)
  _write(cut)
  raw = bytearray(pathlib.Path(flipped).read_bytes())
  second = 16 + len(data[0]) + 12
  raw[second + 3] ^= 1
  pathlib.Path(flipped).write_bytes(raw)
  os.truncate(cut, os.path.getsize(cut) - 7)
  indexes = index.load_indexes([good, flipped, cut])
  assert [len(i) for i in indexes] == [5, 4, 4]
  assert indexes[1].damage == ((second, "data checksum"),)
  assert indexes[2].damage[0][1] == "truncated record"
  assert f"{flipped}: damaged at byte {second}: data checksum" in caplog.text
  assert f"{cut}: 1 damaged, 4 usable records" in caplog.text
  assert index.load_index(flipped).damage == indexes[1].damage  # from the sidecar, too


def test_progress_counts_bytes(tmp_path):
  paths = [str(tmp_path / f"{number}.tfrecord") for number in range(4)]
  for path in paths:
    _write(path)
  calls = []
  index.load_indexes(paths, lambda done, total: calls.append((done, total)))
  total = sum(map(os.path.getsize, paths))
  assert len(calls) == 4 and calls[-1] == (total, total)


def test_header_is_readable(tmp_path):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  index.load_index(path)
  header = json.loads(pathlib.Path(path + ".ovidx").read_bytes().partition(b"\n")[0])
  assert header["records"] == 5 and header["format"] == index.FORMAT


def test_missing_shard(tmp_path):
  with pytest.raises(FileNotFoundError):
    index.load_indexes([str(tmp_path / "absent.tfrecord")])


def test_command_line(tmp_path, capsys):
  _write(tmp_path / "train-0.tfrecord")
  _write(tmp_path / "val-0.tfrecord")
  index.main([str(tmp_path)])  # all splits
  assert "10 records in 2 shards, 0 damaged" in capsys.readouterr().out
  with pytest.raises(SystemExit, match="no shards at"):
    index.main([str(tmp_path / "nowhere")])
