"""Signals, closed streams, locales and concurrent conversions: one-line errors and exit codes."""

from collections.abc import Iterator
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from tools.data import convert
from tools.data.testing import jpeg, write

_ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Images for about 60 shards, so that the conversion takes some time."""
  folder = tmp_path_factory.mktemp("photos")
  data = jpeg(1, (600, 600), "PNG")
  for number in range(60):
    write(folder / ("cat" if number % 2 else "dog") / f"{number}.png", data)
  return folder


def _start(*arguments: str) -> subprocess.Popen[str]:
  command = [sys.executable, "-m", convert.__name__, *arguments]
  pipe = subprocess.PIPE
  return subprocess.Popen(
    command, env=_ENV, stdout=pipe, stderr=pipe, text=True, start_new_session=True
  )


@pytest.fixture
def running(photos: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
  """A conversion to tmp_path/out that has written a shard."""
  with _start(f"--input={photos}", f"--output={tmp_path}/out", "--shard_mb=1") as process:
    until = time.monotonic() + 60
    while not [*tmp_path.glob("out/*.tfrecord")] and process.poll() is None:
      assert time.monotonic() < until
      time.sleep(0.01)
    yield process
    if process.poll() is None:
      process.kill()


@pytest.mark.parametrize(
  ("number", "name"), [(signal.SIGINT, r"SIGINT (Ctrl-C)"), (signal.SIGTERM, "SIGTERM")]
)
def test_signals_give_one_line_errors(
  photos: Path, tmp_path: Path, running: subprocess.Popen[str], number: signal.Signals, name: str
):
  os.killpg(running.pid, number)  # like a terminal: all processes of the group
  out, err = running.communicate(timeout=60)
  assert running.returncode == 128 + number and not out
  *_, last = err.splitlines()
  assert last == f"convert: stopped by {name}; repeat the command to resume"
  assert "Traceback" not in err and not (tmp_path / "out/dataset.json").exists()


def test_a_second_conversion_is_rejected(
  photos: Path, tmp_path: Path, running: subprocess.Popen[str]
):
  arguments = (f"--input={photos}", f"--output={tmp_path}/out", "--shard_mb=1")
  os.killpg(running.pid, signal.SIGSTOP)  # otherwise it could finish before the second one starts
  try:
    second = _start(*arguments)
    _, err = second.communicate(timeout=60)
  finally:
    os.killpg(running.pid, signal.SIGCONT)
  assert second.returncode == 2
  [last] = [line for line in err.splitlines() if "error" in line]
  assert f"out is locked by process {running.pid} on " in last
  assert ", started 20" in last and "wait until it has finished" in last
  assert running.wait(timeout=60) == 0
  counts = json.loads((tmp_path / "out/dataset.json").read_text())["splits"]["train"]
  assert counts["examples"] == 60
  assert not (tmp_path / "out/dataset.lock").exists()


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", ">/dev/full 2>&1", ">&- 2>&-"])
def test_output_that_cannot_be_written_does_not_stop_the_conversion(
  photos: Path, tmp_path: Path, redirect: str
):
  command = f"{sys.executable} -m {convert.__name__} --input={photos} --output={tmp_path}/out"
  done = subprocess.run(["sh", "-c", f"{command} --limit=4 {redirect}"], env=_ENV, check=False)
  assert done.returncode == 0 and (tmp_path / "out/dataset.json").exists()


def test_paths_are_utf_8_independent_of_the_locale(tmp_path: Path):
  write(tmp_path / "bildér/kätze/ä.jpg", jpeg(1))
  write(tmp_path / "bildér/hund/ö.jpg", jpeg(2))
  env = _ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  command = [sys.executable, "-m", convert.__name__, f"--input={tmp_path}/bildér"]
  done = subprocess.run(
    [*command, f"--output={tmp_path}/öut"], env=env, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "öut: 2 train examples" in done.stdout.decode()
  assert (tmp_path / "öut/classes.txt").read_text("utf-8") == "hund\nkätze\n"
