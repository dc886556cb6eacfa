"""Output directories: validation, write errors, and locking."""

from collections.abc import Iterator
import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from ov_data import fs, lock_owner, output_lock, outputs, shards, sources, writer


def _make_shard(split: str, number: int) -> Iterator[writer.Features]:
  for i in range(3):
    yield {"key": f"{split}-{number}-{i}"}


def _write(
  path: object, splits: dict[str, int] | None = None, **arguments: object
) -> writer.Summary:
  return writer.write_dataset(
    path, splits or {"train": 2}, _make_shard, {"seed": 1}, workers=0, **arguments
  )  # fmt: skip


@pytest.mark.parametrize("scheme", ["gs", "s3", "http", "https", "hdfs", "abfss", "GS"])
@pytest.mark.parametrize("as_path", [False, True])
def test_remote_outputs_are_rejected(tmp_path, monkeypatch, scheme, as_path):
  monkeypatch.chdir(tmp_path)
  url = f"{scheme}://bucket/shards"
  path = pathlib.Path(url) if as_path else url  # pathlib collapses "//"
  message = f"output {url}: expected a local path; write to a local directory and copy it to {url}"
  with pytest.raises(ValueError, match=message):
    _write(path)
  with pytest.raises(ValueError, match="expected a local path"):
    writer.ShardWriter(path)
  assert not list(tmp_path.iterdir())


def test_file_urls_and_nul(tmp_path):
  with pytest.raises(ValueError, match=f"omit the scheme: {tmp_path}"):
    _write(f"file://{tmp_path}")
  with pytest.raises(ValueError, match="contains a NUL byte"):
    _write(f"{tmp_path}/a\0b")


@pytest.mark.parametrize(
  "name",
  ["photos@512", "what?", "a*b", "b[1]", "{}", "{a,b}", "x.json", "train", "a b\n", "caf\udce9"],
)
def test_outputs_with_special_names_can_be_read(tmp_path, name):
  summary = _write(tmp_path / name, {"train": 2, "val": 1})
  assert summary.examples == {"train": 6, "val": 3}
  assert len(sources.Dataset(sources.Source(str(tmp_path / name), "train"))) == 6
  assert len(sources.Dataset(sources.Source(f"{tmp_path / name}/val-*"))) == 3
  assert str(summary).isprintable() and str(summary).encode()


def test_impossible_directories(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("x")
  os.symlink("nowhere", tmp_path / "link")
  os.mkfifo(tmp_path / "pipe")
  for path, message in (
    ("file", "file is not a directory"),
    ("file/below", "file is not a directory"),
    ("pipe", "pipe is not a directory"),
    ("link", "link is a broken link"),
    ("link/below", "link is a broken link"),
  ):
    with pytest.raises(ValueError, match=message):
      _write(tmp_path / path)
  with pytest.raises(OSError, match="name too long"):
    _write(tmp_path / ("x" * 300))
  with pytest.raises(ValueError, match="there is no directory .*absent; create it"):
    writer.ShardWriter(tmp_path / "absent/a.tfrecord")
  with pytest.raises(ValueError, match="is a directory; expected the name of a file"):
    writer.ShardWriter(tmp_path)
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  with pytest.raises(PermissionError, match="cannot be written: .*choose another directory"):
    _write(tmp_path / "new")
  assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"]


def test_directories_that_would_not_be_read(tmp_path):
  (tmp_path / "a/train").mkdir(parents=True)
  with pytest.raises(ValueError, match="has a folder 'train', which would be read as the split"):
    _write(tmp_path / "a")
  (tmp_path / "b").mkdir()
  (tmp_path / "b/dataset_info.json").write_text('{"splits": []}')
  with pytest.raises(ValueError, match="TensorFlow Datasets"):
    _write(tmp_path / "b")
  for splits in ({"a/b": 1}, {"a[1]": 1}, {"": 1}, {"train": 1, "train-hard": 1}):
    with pytest.raises(ValueError, match="expected a name without"):
      _write(tmp_path / "c", splits)
  assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["dataset.json", "skipped.jsonl", "dataset.lock", "classes.txt"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "link to nowhere"])
def test_names_that_already_exist(tmp_path, name, kind):
  {
    "directory": os.mkdir,
    "pipe": os.mkfifo,
    "link to nowhere": lambda path: os.symlink(tmp_path / "none", path),
  }[kind](tmp_path / name)
  with pytest.raises(
    ValueError, match=f"{name} exists and is not a file of a data set.* remove it"
  ):
    outputs.check_names(tmp_path, ("classes.txt",))
  if name != "classes.txt":
    with pytest.raises(ValueError, match=f"{name} exists and is not a file of a data set"):
      _write(tmp_path)
  assert os.listdir(tmp_path) == [name]


def test_a_file_where_the_progress_is_kept(tmp_path):
  (tmp_path / "dataset.progress").write_text("")
  with pytest.raises(ValueError, match="dataset.progress exists and is not a file of a data set"):
    _write(tmp_path)


def test_impossible_numbers_of_workers(tmp_path):
  with pytest.raises(ValueError, match="workers=-1: expected 0 .* or a number of processes"):
    writer.write_dataset(tmp_path / "out", {"train": 1}, _make_shard, {}, workers=-1)
  with pytest.raises(ValueError, match="workers=1000000000: .* at most 1,024"):
    writer.write_dataset(tmp_path / "out", {"train": 1}, _make_shard, {}, workers=10**9)
  assert not (tmp_path / "out").exists()


class _Full:
  """File on a disk that becomes full after some bytes."""

  def __init__(self, file, room, error):
    self._file, self._room, self._error = file, room, error

  def write(self, data):
    self._room -= len(data)
    if self._room < 0:
      raise OSError(self._error, os.strerror(self._error))
    return self._file.write(data)

  def __getattr__(self, name):
    return getattr(self._file, name)


@pytest.mark.parametrize(
  "code, message",
  [
    (errno.ENOSPC, r"No space left on device \([\d,]+ bytes free\); free some space"),
    (errno.EDQUOT, "quota is exceeded"),
    (errno.EROFS, "mounted read-only; choose another directory"),
    (errno.EACCES, "choose another directory, or change its permissions"),
  ],
)
def test_errors_of_writing_name_path_and_remedy(tmp_path, code, message):
  shard = tmp_path / "a.tfrecord"
  with pytest.raises(OSError, match=message) as caught, writer.ShardWriter(shard) as out:
    out._file = _Full(out._file, 100, code)
    for number in range(9):
      out.write({"key": str(number)})
  assert str(shard) in str(caught.value) and "\n" not in str(caught.value)
  assert caught.value.errno == code
  assert not list(tmp_path.iterdir())


def test_a_full_disk_while_files_are_replaced(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(OSError, match=rf"free some space.*{tmp_path}/x\.json"):
    fs.write_atomic(str(tmp_path / "x.json"), b"x")
  assert not list(tmp_path.iterdir())


def test_a_shard_that_cannot_be_read_back(tmp_path):
  with (
    pytest.raises(OSError, match="3 records were written but 2 can be read"),
    writer.ShardWriter(tmp_path / "a.tfrecord") as out,
  ):
    for number in range(3):
      out.write({"key": str(number)})
    out._file.seek(20)
    out._file.write(b"\xff")


_HOLD = (
  "import sys, time; from ov_data import outputs; import pathlib\n"
  "with outputs.locked(pathlib.Path(sys.argv[1])):\n"
  "  print('locked', flush=True)\n"
  "  time.sleep(60)\n"
)


@pytest.fixture
def other_writer(tmp_path):
  """Process that writes to tmp_path/d."""
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-c", _HOLD, str(tmp_path / "d")]
  with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
    assert process.stdout and process.stdout.readline() == b"locked\n"
    yield process
    process.kill()


def test_a_second_writer_is_rejected_until_the_first_ends(tmp_path, other_writer):
  folder = tmp_path / "d"
  message = rf"d is locked by process {other_writer.pid} on .*wait until it has finished"
  with pytest.raises(ValueError, match=message):
    _write(folder)
  with pytest.raises(ValueError, match=message), outputs.locked(folder):
    pass
  with pytest.raises(ValueError, match=message):
    _write(folder, overwrite=True)
  _write(tmp_path / "e")  # another directory
  other_writer.kill()
  other_writer.wait()
  assert (folder / outputs.LOCK).exists()  # a stale lock file does not block
  assert _write(folder).examples == {"train": 6}
  assert not (folder / outputs.LOCK).exists()


_ORPHAN = (
  "import subprocess, sys, pathlib; from ov_data import outputs\n"
  "with outputs.locked(pathlib.Path(sys.argv[1])) as lock:\n"
  "  subprocess.Popen(['sleep', sys.argv[2]], pass_fds=[lock])\n"
  "  sys.stdout.flush(); import os; os.kill(os.getpid(), 9)\n"
)


def test_workers_of_a_killed_writer_keep_others_out(tmp_path, monkeypatch):
  """Otherwise their output would mix with the shards of the next writer."""
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  subprocess.run([sys.executable, "-c", _ORPHAN, str(tmp_path / "d"), "2"], env=env, check=False)
  start = time.monotonic()
  outputs.check_directory(tmp_path / "d")  # workers are exiting
  assert _write(tmp_path / "d").examples == {"train": 6}
  assert time.monotonic() - start > 1
  subprocess.run([sys.executable, "-c", _ORPHAN, str(tmp_path / "e"), "9"], env=env, check=False)
  monkeypatch.setattr(output_lock, "_ORPHANS_SECONDS", 0.1)
  with pytest.raises(ValueError, match="e is locked by workers of a killed process"):
    _write(tmp_path / "e")


def test_a_number_that_another_process_reuses(tmp_path, other_writer):
  """A reused PID is not reported as the owner while workers of a killed owner hold the lock."""
  path = tmp_path / "d" / outputs.LOCK
  owner = json.loads(path.read_text())
  path.write_text(json.dumps(owner | {"started": "1"}))
  outputs.check_directory(tmp_path / "d")
  path.write_text(json.dumps(owner))
  with pytest.raises(
    ValueError, match=rf"process {other_writer.pid} on .*, started 20\d\d-.* UTC;"
  ):
    outputs.check_directory(tmp_path / "d")


@pytest.fixture
def no_flock(monkeypatch):
  """Simulate a file system without locks."""

  def flock(descriptor, kind):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(output_lock.fcntl, "flock", flock)
  monkeypatch.setattr(output_lock, "_STALE_SECONDS", 0.5)
  monkeypatch.setattr(output_lock, "_RENEW_SECONDS", 0.1)
  monkeypatch.setattr(output_lock, "_SETTLE_SECONDS", 0.01)


def test_without_flock_an_owner_on_this_machine_counts_by_its_process(
  tmp_path, other_writer, no_flock
):
  message = rf"d is locked by process {other_writer.pid} on "
  with pytest.raises(ValueError, match=message):
    outputs.check_directory(tmp_path / "d")
  with pytest.raises(ValueError, match=message), outputs.locked(tmp_path / "d"):
    pass
  other_writer.kill()
  other_writer.wait()
  start = time.monotonic()
  assert _write(tmp_path / "d").examples == {"train": 6}
  assert time.monotonic() - start < 5 and not (tmp_path / "d" / outputs.LOCK).exists()


def test_without_flock_an_owner_elsewhere_counts_while_it_renews_the_file(tmp_path, no_flock):
  path = tmp_path / outputs.LOCK
  owner = dataclasses.replace(
    lock_owner.this_process(),
    pid=7,
    host="elsewhere",
    machine="elsewhere",
    since="2026-11-28 10:00:00 UTC",
  )
  path.write_bytes(lock_owner.to_bytes(owner))
  with outputs.locked(tmp_path):  # not renewed
    assert json.loads(path.read_text())["pid"] == os.getpid()
    before = path.stat().st_mtime_ns
    time.sleep(0.3)
    assert path.stat().st_mtime_ns > before
  path.write_bytes(lock_owner.to_bytes(owner))
  timer = threading.Timer(0.2, os.utime, [path])
  timer.start()
  with (
    pytest.raises(ValueError, match="by process 7 on elsewhere, started 2026-11-28 10:00:00 UTC;"),
    outputs.locked(tmp_path),
  ):
    pass
  timer.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 99_999, b"\xff", b'{"pid": 1}'])
def test_a_damaged_lock_file(tmp_path, content):
  tmp_path.joinpath(outputs.LOCK).write_bytes(content)
  assert _write(tmp_path).examples == {"train": 6}


def test_a_failed_writer_leaves_no_lock(tmp_path):
  with pytest.raises(ZeroDivisionError):
    writer.write_dataset(tmp_path, {"train": 1}, lambda *_: 1 / 0, {}, workers=0)
  assert not (tmp_path / outputs.LOCK).exists()


def test_two_writers_at_once_make_one_data_set(tmp_path):
  """Of two concurrent processes, one writes; the other fails or finds a complete data set."""
  program = """if True:
    import sys, time
    from ov_data import writer

    def shard(split, number):
      for i in range(100):
        time.sleep(0.01 if number else 0)
        yield {"txt": f"{number} {i}"}

    print(writer.write_dataset(sys.argv[1], {"train": 3}, shard, {}, workers=0))
  """
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-c", program, str(tmp_path / "d")]
  processes = [
    subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outcomes = []
  for process in processes:
    out, err = process.communicate()
    outcomes.append(process.returncode == 0 and "300 train" in out)
    assert outcomes[-1] or "is locked by process" in err
  assert any(outcomes)
  assert len(shards.find_shards(str(tmp_path / "d"), "train")) == 3


def test_foreign_partial_files_are_kept(tmp_path):
  (tmp_path / "download.part").write_text("mine")
  (tmp_path / "train-00000-of-00002.tfrecord.123.part").write_text("of a killed writer")
  _write(tmp_path)
  assert [p.name for p in tmp_path.glob("*.part")] == ["download.part"]


def test_checking_takes_no_time(tmp_path):
  start = time.perf_counter()
  for _ in range(100):
    outputs.check_directory(tmp_path / "a/b/c")
  assert time.perf_counter() - start < 2
