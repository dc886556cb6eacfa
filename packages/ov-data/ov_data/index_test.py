"""Shard indexes: valid, invalid and rebuilt sidecars, damage, and the command."""

import json
import os
import pathlib
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest

from ov_data import Dataset, Source, fs, index, records
from ov_data.index import __main__ as command
from ov_data.index import build, sidecar
from ov_data.testing.shards import write_tar


def _write(path, count=5, seed=0):
  rng = np.random.default_rng(seed)
  data = [rng.bytes(100 + 10 * number) for number in range(count)]
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  pathlib.Path(path).write_bytes(b"".join(map(records.frame, data)))
  return data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("OV_DATA_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
  """Count the scans of shards."""
  paths = []
  original = build._build
  monkeypatch.setattr(build, "_build", lambda path, *a: (paths.append(path), original(path, *a))[1])
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


def _sealed(header, payload=b""):
  content = json.dumps(header).encode() + b"\n" + payload
  return content + google_crc32c.value(content).to_bytes(4, "little")


def _as_format_1(whole):
  """Return the sidecar in format 1, without a checksum over the header."""
  line, _, payload = whole[:-4].partition(b"\n")
  header = {**json.loads(line), "format": "ov_data index 1", "damage": []}
  header["checksum"] = google_crc32c.value(payload)
  return json.dumps(header).encode() + b"\n" + payload


def _change(**values):
  def change(whole):
    line, _, payload = whole[:-4].partition(b"\n")
    return _sealed({**json.loads(line), **values}, payload)

  return change


def _offsets(change):
  def changed(whole):
    line, _, payload = whole[:-4].partition(b"\n")
    offsets = change(np.frombuffer(payload, "<u8", 5).copy())
    return _sealed(json.loads(line), offsets.tobytes() + payload[40:])

  return changed


@pytest.mark.parametrize(
  "break_it",
  [
    lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    lambda whole: whole[:-5],
    lambda whole: whole + b"\0",
    lambda whole: b"",
    lambda whole: bytes(len(whole)),
    lambda whole: whole.replace(b"index 2", b"index 9"),
    lambda whole: whole.replace(b'"records": 5', b'"records": 0'),
    lambda whole: whole.replace(b'"damage": []', b'"damage":  [')[:-1] + b"]",
    _as_format_1,
    lambda whole: _as_format_1(whole).replace(b'"records": 5', b'"records": 0'),
    lambda whole: b"[" * 200_000,
    lambda whole: _sealed([]),
    lambda whole: _sealed(None),
    _change(records=0),
    _change(records=6),
    _change(records="5"),
    _change(records=5.0),
    _change(records=True),
    _change(records=-5),
    _change(records=10**30),
    _change(damage=7),
    _change(damage=[[1]]),
    _change(damage=[[0, 10**9, "x", None]]),
    _change(damage=[[0, 1, 5, None]]),
    _change(fingerprint="x"),
    _change(size=None),
    _offsets(lambda o: o[::-1]),
    _offsets(lambda o: o + np.uint64(10)),
    _offsets(lambda o: o * np.uint64(1 << 40)),
    _offsets(lambda o: np.full(5, 12, np.uint64)),
    _offsets(lambda o: o - np.uint64(13)),
  ],
)
def test_a_broken_sidecar_is_replaced(tmp_path, builds, break_it):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  index.load_index(path)
  side = pathlib.Path(path + ".ovidx")
  whole = side.read_bytes()
  side.write_bytes(break_it(whole))
  assert len(index.load_index(path)) == 5
  assert len(builds) == 2 and side.read_bytes() == whole


def test_every_flipped_bit_of_a_sidecar_is_detected(tmp_path):
  path = str(tmp_path / "a.tfrecord")
  _write(path, count=2)
  whole = sidecar.serialise(index.load_index(path))
  for byte in range(len(whole)):
    with pytest.raises(ValueError):
      sidecar.parse(path, whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])


def test_a_damaged_sidecar_is_logged(tmp_path, caplog):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  index.load_index(path)
  side = pathlib.Path(path + ".ovidx")
  side.write_bytes(side.read_bytes().replace(b'"records": 5', b'"records": 0'))
  index.load_index(path)
  assert f"the index at {side} is damaged (checksum) and is rebuilt" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("nowhere", p)])
def test_a_sidecar_that_is_not_a_regular_file_is_ignored(tmp_path, make):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  make(path + ".ovidx")
  assert len(index.load_index(path)) == 5


@pytest.mark.parametrize(
  "make, message",
  [
    (os.mkfifo, "is a pipe; expected a regular file"),
    (os.mkdir, "is a directory; expected a regular file"),
    (lambda p: os.symlink("/dev/zero", p), "is a device; expected a regular file"),
    (lambda p: os.symlink("nowhere", p), "No such file"),
  ],
)
def test_a_shard_that_is_not_a_regular_file_is_named(tmp_path, make, message):
  path = str(tmp_path / "a.tfrecord")
  make(path)
  with pytest.raises(OSError, match=message):
    index.load_index(path)


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
  path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tfrecord")
  _write(path)
  write = fs.write_atomic
  monkeypatch.setattr(
    fs, "write_atomic", lambda p, d: _refuse(p) if p.startswith(path) else write(p, d)
  )
  assert len(index.load_index(path)) == 5  # stored in the cache under a hash of the path
  assert len(list((tmp_path / "cache").iterdir())) == 1


def _refuse(path):
  raise PermissionError(path)


def test_read_only_directory_uses_the_cache(tmp_path, builds, cache, monkeypatch):
  path = str(tmp_path / "a.tfrecord")
  _write(path)
  write = fs.write_atomic

  monkeypatch.setattr(
    fs, "write_atomic", lambda p, d: _refuse(p) if p.startswith(path) else write(p, d)
  )
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
  assert indexes[1].damage == ((second, len(data[1]), "data checksum", 1),)
  assert indexes[2].damage[0].reason == "truncated record"
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


def _command(*arguments):
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-m", "ov_data.index", *arguments]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_command(tmp_path):
  _write(tmp_path / "d/train-0.tfrecord")
  _write(tmp_path / "d/val-0.tfrecord")
  done = _command(str(tmp_path / "d"))  # all splits
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == f"{tmp_path}/d: 10 records in 2 shards, 0 damaged; indexes use 0.0 MB\n"
  assert (tmp_path / "d/train-0.tfrecord.ovidx").exists()


def test_command_with_folders_of_splits(tmp_path, capsys):
  for split in ("train", "val"):
    _write(tmp_path / "d[1]" / split / "0.tfrecord")
  assert command.main([str(tmp_path / "d[1]")]) == 0
  assert "10 records in 2 shards, 0 damaged" in capsys.readouterr().out


def test_command_reports_damage(tmp_path, capsys):
  path = tmp_path / "d/train-00000-of-00001.tfrecord"
  _write(path)
  os.truncate(path, path.stat().st_size - 7)
  assert command.main([str(tmp_path / "d")]) == 1
  assert "4 records in 1 shards, 1 damaged" in capsys.readouterr().out
  os.truncate(path, 0)
  split = {"examples": 5, "shards": 1, "fingerprint": ""}
  content = {"format": "ov_data dataset 1", "splits": {"train": split}}
  (tmp_path / "d/dataset.json").write_text(json.dumps(content))
  assert command.main([str(tmp_path / "d")]) == 1
  assert "split 'train' has 5 records, but its shards hold 0" in capsys.readouterr().err


def test_errors_of_the_command_are_one_line(tmp_path):
  (tmp_path / "a.zip").write_bytes(b"")
  os.mkfifo(tmp_path / "b.tfrecord")
  os.mkdir(tmp_path / "empty")
  paths = [tmp_path / name for name in ("nowhere", "a.zip", "b.tfrecord", "empty", "*.tfrecord")]
  done = _command(*map(str, paths))
  assert done.returncode == 2 and not done.stdout
  lines = done.stderr.splitlines()
  assert len(lines) == 5 and all(line.startswith("ov_data.index: error: ") for line in lines)
  assert "no shards at" in lines[0] and "no such file or directory" in lines[0]
  assert "a.zip is an archive" in lines[1] and "convert" in lines[1]
  assert "b.tfrecord is a pipe" in lines[2]
  assert "no *.tfrecord* file in it" in lines[3]
  assert _command().returncode == 2 and "usage" in _command().stderr


def test_command_indexes_tars(tmp_path, capsys):
  write_tar(tmp_path / "00000.tar", [{"jpg": b"x", "txt": "a"}] * 3)
  write_tar(tmp_path / "00001.tar", [{"jpg": b"x", "txt": "a"}] * 3)
  assert command.main([str(tmp_path)]) == 0
  assert "6 records in 2 shards, 0 damaged" in capsys.readouterr().out
  assert (tmp_path / "00001.tar.ovidx").exists()


@pytest.fixture
def many(tmp_path, monkeypatch):
  """Paths of shards, for which a catalog is stored."""
  monkeypatch.setattr(build, "_CATALOG_SHARDS", 3)
  paths = [str(tmp_path / f"{number}.tfrecord") for number in range(4)]
  for number, path in enumerate(paths):
    _write(path, seed=number, count=number + 1)
  return paths


@pytest.fixture
def opened(monkeypatch):
  """Paths of the shards whose edges are read."""
  paths = []
  original = build.load_index
  monkeypatch.setattr(build, "load_index", lambda p, *a: (paths.append(p), original(p, *a))[1])
  return paths


def _facts(indexes):
  return [(i.path, i.size, i.fingerprint, len(i), i.damage, i.offsets.tolist()) for i in indexes]


def test_a_catalog_opens_many_shards_without_reading_them(many, opened):
  os.truncate(many[2], os.path.getsize(many[2]) - 1)
  first = index.load_indexes(many)
  assert sorted(opened) == many
  again = index.load_indexes(many)
  assert len(opened) == 4 and _facts(again) == _facts(first)
  assert index.counts(again) == [1, 2, 2, 4] and index.paths_of(again) == many
  assert [i.path for i in index.damaged(again)] == [many[2]] == [first[2].path]
  assert again[-1].path == many[3] and [i.path for i in again[1:3]] == many[1:3]


def test_a_catalog_loads_only_shards_that_changed(many, opened):
  index.load_indexes(many)
  opened.clear()
  _write(many[1], seed=9, count=2)  # same size
  os.remove(many[3] + ".ovidx")
  found = index.load_indexes(many)
  assert sorted(opened) == [many[1], many[3]] and len(found[1]) == 2
  opened.clear()
  index.load_indexes(many)
  assert not opened
  os.remove(many[0])
  with pytest.raises(FileNotFoundError):
    index.load_indexes(many)


@pytest.mark.parametrize(
  "change", [lambda data: b"", lambda data: data[:-1], lambda data: b"{" * 99]
)
def test_a_damaged_catalog_is_rebuilt(many, opened, cache, change, caplog):
  index.load_indexes(many)
  (catalog,) = cache.glob("*.ovcat")
  whole = catalog.read_bytes()
  catalog.write_bytes(change(whole))
  index.load_indexes(many)
  assert len(opened) == 8 and "is damaged" in caplog.text
  index.load_indexes(many)
  assert len(opened) == 8


def test_positions_are_not_in_memory(tmp_path):
  path = str(tmp_path / "a.tfrecord")
  data = _write(path)
  found = index.load_index(path)
  assert found.columns is None and found.sidecar == path + ".ovidx"
  positions = found.part(1, 4).positions(1, 3)
  assert [positions.lengths.tolist(), len(positions)] == [[len(d) for d in data[2:4]], 2]


def test_a_removed_sidecar_is_rebuilt_during_a_run(tmp_path, caplog):
  for name in ("a", "b"):
    _write(str(tmp_path / f"{name}.tfrecord"))
  dataset = Dataset(Source(str(tmp_path / "*.tfrecord"), "[1:9]"))
  expected = [dataset.locate(n) for n in range(8)]
  dataset._records._reader.cache_clear()
  for path in tmp_path.glob("*.ovidx"):
    path.unlink()
  assert [dataset.locate(n) for n in range(8)] == expected
  assert "was removed and is rebuilt" in caplog.text
