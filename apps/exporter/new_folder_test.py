"""Tests that a new folder is created atomically, and not writable by others before."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from apps.exporter.new_folder import new_folder
from ov_convert.client_env import ClientError


@pytest.fixture(autouse=True)
def umask():
  before = os.umask(0o027)
  yield
  os.umask(before)


def _mode(path):
  return path.stat().st_mode & 0o777


def test_it_is_private_until_complete_and_then_as_the_umask_says(tmp_path):
  with new_folder(tmp_path / "parent" / "out") as folder:
    assert folder.parent == tmp_path / "parent" and _mode(folder) == 0o700
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").touch(mode=0o600)
    assert not (tmp_path / "parent" / "out").exists()
  out = tmp_path / "parent" / "out"
  assert [path.name for path in out.parent.iterdir()] == ["out"]
  assert (_mode(out), _mode(out / "inner")) == (0o750, 0o750)
  assert _mode(out / "inner" / "weights") == 0o640


def test_an_empty_folder_is_replaced_and_another_is_not(tmp_path):
  (tmp_path / "out").mkdir()
  with new_folder(tmp_path / "out") as folder:
    (folder / "new").touch()
  assert (tmp_path / "out" / "new").exists()
  with pytest.raises(OSError, match="written: .*not empty"), new_folder(tmp_path / "out"):
    pass
  assert os.listdir(tmp_path) == ["out"]


def test_links_that_others_plant_are_not_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.mkdir()
  (victim / "kept").touch()
  planted = [tmp_path / name for name in (".out.partial", ".out.x.partial")]
  for link in planted:
    link.symlink_to(victim)
  with new_folder(tmp_path / "out") as folder:
    (folder / "new").touch()
  assert os.listdir(victim) == ["kept"]
  assert not (tmp_path / "out").is_symlink() and (tmp_path / "out" / "new").exists()
  assert all(link.is_symlink() for link in planted)


def test_a_link_at_the_place_itself_is_refused(tmp_path):
  (tmp_path / "victim").mkdir()
  (tmp_path / "out").symlink_to(tmp_path / "victim")
  with (
    pytest.raises(OSError, match="out cannot be written"),
    new_folder(tmp_path / "out") as folder,
  ):
    (folder / "new").touch()
  assert os.listdir(tmp_path / "victim") == []
  assert sorted(os.listdir(tmp_path)) == ["out", "victim"]


def test_a_folder_that_was_replaced_by_a_link_is_not_handed_over(tmp_path):
  (tmp_path / "victim").mkdir()
  with pytest.raises(OSError, match="was replaced"), new_folder(tmp_path / "out") as folder:
    folder.rename(tmp_path / "away")
    folder.symlink_to(tmp_path / "victim")
  assert not os.path.lexists(tmp_path / "out") and (tmp_path / "victim").exists()


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    safetensors.SafetensorError("I/O error: No space left on device\n (os error 28)"),
    ClientError("write_onnx.py failed: a traceback\nOSError: No space left on device"),
  ],
)
def test_a_full_disk_is_one_line_and_leaves_no_files(tmp_path, error):
  raises = pytest.raises(OSError, match="out cannot be written: .*(space|quota)")
  with raises as told, new_folder(tmp_path / "out") as folder:
    (folder / "half").touch()
    raise error
  assert "\n" not in str(told.value) and os.listdir(tmp_path) == []


def test_a_file_size_limit_is_reported(tmp_path):
  """Tests a file size limit of the system: safetensors and Python report it differently."""
  code = f"""
import resource, signal, sys, pathlib, numpy, safetensors.numpy
from apps.exporter.new_folder import new_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
  with new_folder(pathlib.Path({str(tmp_path / "out")!r})) as folder:
    safetensors.numpy.save_file({{"a": numpy.zeros(10_000)}}, folder / "weights.safetensors")
except OSError as error:
  sys.exit(str(error))
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert "out cannot be written" in done.stderr and "too large" in done.stderr.lower()
  assert len(done.stderr.strip().splitlines()) == 1
  assert os.listdir(tmp_path) == []


def test_errors_of_input_files_are_unchanged(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.json"), new_folder(tmp_path / "out" / "x"):
    (tmp_path / "none.json").read_text()
  with pytest.raises(ValueError, match="does not fit"), new_folder(tmp_path / "out"):
    raise ValueError("does not fit")


def test_folders_of_killed_processes_are_removed_and_of_running_ones_kept(tmp_path):
  code = f"""
import pathlib, sys
from apps.exporter.new_folder import new_folder
with new_folder(pathlib.Path({str(tmp_path / "out")!r})) as folder:
  (folder / "half").touch()
  print(folder, flush=True)
  sys.stdin.read()
"""
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as running:
    left = running.stdout.readline().strip()
    with new_folder(tmp_path / "out"):
      assert os.path.exists(left)
    (tmp_path / "out").rmdir()
    running.send_signal(signal.SIGKILL)
  assert os.path.exists(left)
  with new_folder(tmp_path / "out") as folder:
    safetensors.numpy.save_file({"a": np.zeros(2)}, folder / "weights")
  assert os.listdir(tmp_path) == ["out"]
