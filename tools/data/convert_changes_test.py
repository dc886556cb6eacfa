"""Converter: input that changes between two runs, and unexpected errors."""

import logging
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from ov_data import decode, layouts
from tools.data import convert, shards
from tools.data.testing import convert_listing, jpeg, read_rows, run_app, skipped, tar, write


def _recaption(path: Path, word: str, count: int, size: tuple[int, int] = (48, 36)) -> Path:
  members = {
    f"{i:04d}.{e}": jpeg(i, size) if e == "jpg" else f"{word} {i}"
    for i in range(count)
    for e in ("jpg", "txt")
  }
  return tar(path, members)


def _words(output: Path) -> set[bytes]:
  return {row["txt"][0].split()[0] for row in read_rows(output).values()}


def test_new_captions_in_a_tar_are_detected(tmp_path: Path):
  arguments = (f"--input={tmp_path}/a.tar", f"--output={tmp_path}/out")
  path = _recaption(tmp_path / "a.tar", "old", 5)
  status = path.stat()
  assert run_app(*arguments).returncode == 0
  _recaption(path, "new", 5)  # equal size
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  done = run_app(*arguments)
  assert done.returncode == 2 and "another data set" in done.stderr
  assert _words(tmp_path / "out") == {b"old"}
  assert run_app(*arguments, "--overwrite").returncode == 0
  assert _words(tmp_path / "out") == {b"new"}


def test_a_resumed_conversion_never_mixes_captions(tmp_path: Path):
  _recaption(tmp_path / "a.tar", "old", 300, (400, 300))
  arguments = (f"--input={tmp_path}/a.tar", f"--output={tmp_path}/out", "--shard_mb=1")
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-m", convert.__name__, *arguments, "--workers=1"]
  process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
  until = time.monotonic() + 60
  while time.monotonic() < until and not [*(tmp_path / "out").glob("*.tfrecord")]:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "out/dataset.json").exists()
  _recaption(tmp_path / "a.tar", "new", 300, (400, 300))
  done = run_app(*arguments)
  assert done.returncode == 2 and "another data set" in done.stderr, done.stderr
  assert run_app(*arguments, "--overwrite").returncode == 0
  assert _words(tmp_path / "out") == {b"new"} and len(read_rows(tmp_path / "out")) == 300


def test_an_image_of_equal_size_in_a_folder_is_detected(tmp_path: Path):
  first, second = jpeg(1), jpeg(2)
  size = max(len(first), len(second))
  write(tmp_path / "in/x/1.jpg", first.ljust(size, b"\0"))
  arguments = (f"--input={tmp_path}/in", f"--output={tmp_path}/out")
  assert run_app(*arguments).returncode == 0
  write(tmp_path / "in/x/1.jpg", second.ljust(size, b"\0"))
  assert "another data set" in run_app(*arguments).stderr
  assert run_app(*arguments, "--overwrite").returncode == 0
  assert read_rows(tmp_path / "out")["x/1.jpg"]["jpg"] == [second.ljust(size, b"\0")]


@pytest.mark.parametrize(
  ("file", "before", "after"),
  [
    ("captions.jsonl", '{"file": "a.jpg", "caption": "x"}', '{"file": "a.jpg", "caption": "y"}'),
    ("labels.jsonl", '{"file": "a.jpg", "label": "x"}', '{"file": "a.jpg", "label": "y"}'),
    ("a.txt", "x", "y"),
    ("a.json", '{"caption": "x"}', '{"caption": "y"}'),
    ("metadata.csv", "file_name,text\na.jpg,x", "file_name,text\na.jpg,y"),
  ],
)
def test_the_digest_depends_on_every_text(tmp_path: Path, file: str, before: str, after: str):
  write(tmp_path / "a.jpg", jpeg(1))
  digests = []
  for text in (before, after, before):
    write(tmp_path / file, text)
    digests.append(shards.digest(layouts.read(str(tmp_path))))
  assert digests[0] == digests[2] != digests[1]


def test_a_tar_that_changes_during_the_conversion_ends_it(tmp_path: Path):
  found = layouts.read(str(_recaption(tmp_path / "a.tar", "old", 5)))
  with tempfile.TemporaryDirectory() as folder:
    plan = shards.plan(found, folder, shards.Options(), holdout=0, shard_bytes=1 << 20, seed=0)
    assert len([*plan("train", 0)]) == 5
    _recaption(tmp_path / "a.tar", "changed", 5)
    with pytest.raises(ValueError, match="a.tar changed during the conversion; repeat the command"):
      list(plan("train", 0))


# Unexpected errors.


def _folder(tmp_path: Path, count: int) -> layouts.Listing:
  for i in range(count):
    write(tmp_path / f"in/x/{i}.jpg", jpeg(i))
  return layouts.read(str(tmp_path / "in"))


def test_an_unexpected_error_of_one_image_is_counted_and_logged_once(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
  real = decode.full

  def full(data: bytes, limits: decode.Limits):
    if data in (jpeg(1), jpeg(3)):
      raise ZeroDivisionError("planted")
    return real(data, limits)

  monkeypatch.setattr(decode, "full", full)
  monkeypatch.setattr(shards, "_logged", set())
  with caplog.at_level(logging.ERROR, "ov_data"):
    convert_listing(_folder(tmp_path, 6), tmp_path / "out")
  assert len(read_rows(tmp_path / "out")) == 4
  assert skipped(tmp_path / "out") == dict.fromkeys(("x/1.jpg", "x/3.jpg"), "unexpected error")
  assert caplog.text.count("Traceback") == 1 and "ZeroDivisionError: planted" in caplog.text


@pytest.mark.parametrize("count", [3, 30])
def test_a_bug_that_hits_every_image_ends_the_run(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
  def full(data: bytes, limits: decode.Limits):
    raise ZeroDivisionError("planted")

  monkeypatch.setattr(decode, "full", full)
  with pytest.raises(RuntimeError, match=rf"first {min(count, 20)} images failed; .*planted"):
    convert_listing(_folder(tmp_path, count), tmp_path / "out")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_memory_errors_and_interrupts_are_not_skips(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
  def full(data: bytes, limits: decode.Limits):
    raise error

  monkeypatch.setattr(decode, "full", full)
  with pytest.raises(error):
    convert_listing(_folder(tmp_path, 1), tmp_path / "out")
