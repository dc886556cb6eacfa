import os
import subprocess
import sys

from tools.python import pytest_main


def run(folder, **variables):
  """Run the runner on a file with one passing test and return its output."""
  test = folder / "one_test.py"
  test.write_text("def test_it():\n  pass\n")
  env = {name: value for name, value in os.environ.items() if "TEST" not in name}
  env |= {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), **variables}
  done = subprocess.run(
    [sys.executable, "-m", pytest_main.__name__, test],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_tests_are_skipped_if_a_library_is_missing(tmp_path):
  (tmp_path / "clients").mkdir()
  reason = tmp_path / "clients" / "unavailable.txt"
  reason.write_text("torch==1 could not be installed\n")
  out = run(tmp_path, TEST_SRCDIR=str(tmp_path))
  assert "1 skipped" in out and "torch==1 could not be installed" in out
  reason.write_text("")
  assert "1 passed" in run(tmp_path, TEST_SRCDIR=str(tmp_path))


def test_a_shard_runs_its_part(tmp_path):
  assert "1 passed" in run(tmp_path, TEST_TOTAL_SHARDS="2", TEST_SHARD_INDEX="0")
  assert "passed" not in run(tmp_path, TEST_TOTAL_SHARDS="2", TEST_SHARD_INDEX="1")


def test_devices_are_simulated_and_run_one_operation_at_a_time(tmp_path):
  (tmp_path / "conftest.py").write_text(
    "import os, pathlib\n"
    "pathlib.Path(__file__).with_name('flags').write_text(os.environ['XLA_FLAGS'])\n"
  )
  run(tmp_path, OV_SIMULATED_DEVICES="8", XLA_FLAGS="--xla_other=1")
  flags = (tmp_path / "flags").read_text()
  assert "--xla_other=1 --xla_force_host_platform_device_count=8" in flags
  assert "concurrency_optimized_scheduler=false" in flags
