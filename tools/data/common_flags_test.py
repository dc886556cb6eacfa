"""Output flags of the commands that write shards."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from ov_data import outputs, sources
from tools.data import scenes

_SMALL = ("--train=4", "--heldout=0", "--image_size=32", "--workers=0")


def _app(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = [sys.executable, "-m", scenes.__name__, *arguments]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=cwd)


def _fails(done: subprocess.CompletedProcess[str], *parts: str) -> None:
  assert done.returncode == 2, done.stderr
  assert done.stderr.count("\n") == 1 and not done.stdout
  for part in parts:
    assert part in done.stderr


@pytest.mark.parametrize("flag", ["output", "sheet"])
def test_remote_outputs_are_rejected_before_any_work(tmp_path: Path, flag: str):
  for url in ("gs://bucket/x.png", "s3://bucket/x.png", "https://host/x.png", "hdfs://n/x.png"):
    done = _app(f"--{flag}={url}", *_SMALL, cwd=tmp_path)
    _fails(done, f"--{flag}", f"output {url}: expected a local path", "write to a local directory")
  done = _app(f"--{flag}=file:///tmp/x.png", *_SMALL, cwd=tmp_path)
  _fails(done, "omit the scheme: /tmp/x.png")
  assert not list(tmp_path.iterdir())


def test_impossible_outputs_are_rejected_before_any_work(tmp_path: Path):
  (tmp_path / "file").write_text("x")
  _fails(_app(f"--output={tmp_path}/file", *_SMALL, cwd=tmp_path), "file is not a directory")
  _fails(_app(f"--output={tmp_path}/file/x", *_SMALL, cwd=tmp_path), "file is not a directory")
  _fails(_app("--output=~nobody.there/x", *_SMALL, cwd=tmp_path), "there is no such user")
  _fails(_app(f"--sheet={tmp_path}", cwd=tmp_path), "is a directory; expected the name of a file")
  _fails(_app("--sheet=absent/x.png", cwd=tmp_path), "there is no directory absent; create it")
  _fails(_app("--sheet=x.bmp2", cwd=tmp_path), "expected a file name that ends with .png")
  with outputs.locked(tmp_path / "busy"):
    done = _app(f"--output={tmp_path}/busy", *_SMALL, cwd=tmp_path)
  _fails(done, f"busy is locked by process {os.getpid()} on ")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["busy", "file"]


@pytest.mark.parametrize("name", ["photos@512", "what?*", "b[1]{}"])
def test_outputs_with_special_names(tmp_path: Path, name: str):
  done = _app(f"--output={name}", f"--sheet={name}.png", *_SMALL, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert f"{name}: 4 train examples" in done.stdout
  assert len(sources.Dataset(sources.Source(str(tmp_path / name), "train"))) == 4
  assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_limit_on_file_sizes_is_reported_in_one_line(tmp_path: Path):
  """The error of a worker process has path and remedy, as for a full disk."""
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
  command = f"ulimit -f 4; exec {sys.executable} -m {scenes.__name__} --output=d --train=3000 "
  done = subprocess.run(
    ["bash", "-c", command + "--heldout=0 --image_size=32 --workers=2"],
    env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
  )
  assert done.returncode == 2, done.stderr
  [line] = [line for line in done.stderr.splitlines() if "error" in line]
  assert "File too large; " in line and "ulimit -f" in line and "d/train-0000" in line
