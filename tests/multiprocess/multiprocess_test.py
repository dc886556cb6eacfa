"""Two processes on loopback sockets give the losses of one process; failures give clear errors."""

import functools
import json
import time

import numpy as np
import pytest

from tests.multiprocess import mlp_worker
from tests.multiprocess.launcher import LaunchError, Result, free_port, launch

# The order of the float32 sums of 16 rows in gradients depends on the mesh (relative error below
# 16 * 6e-8), and five steps at learning rate 0.1 amplify the error little.
RTOL = 1e-5


def train(processes, devices, *args):
  results = launch([mlp_worker.__file__, *args], processes=processes, devices=devices, timeout=120)
  # Gloo also logs to standard output; the result is the only JSON line.
  lines = [json.loads(line) for r in results for line in r.stdout.splitlines() if line[0] == "{"]
  assert [line["processes"] for line in lines] == [processes] * processes
  assert all(line == lines[0] for line in lines)
  return lines[0]


@functools.cache
def one_process():
  return train(1, 4, "4", "1", "1", "mesh")


def test_one_process_learns():
  losses = one_process()["losses"]
  assert len(losses) == 5 and np.all(np.isfinite(losses))
  assert len(set(losses)) == 5


@pytest.mark.parametrize(
  "args",
  [
    ("-1", "1", "1", "mesh"),  # data across processes
    ("1", "4", "1", "mesh"),  # params sharded across processes
    ("1", "2", "2", "interleaved"),  # devices of the two processes alternate along the batch
  ],
)
def test_two_processes_give_the_losses_of_one(args):
  expected, got = one_process(), train(2, 2, *args)
  np.testing.assert_allclose(got["losses"], expected["losses"], rtol=RTOL)
  np.testing.assert_allclose(got["checksum"], expected["checksum"], rtol=RTOL)


def run_python(code, **options):
  return launch(["-c", code], **options)


def test_launcher_kills_the_others_when_one_fails():
  code = """
import os, sys, time
if os.environ["OV_PROCESS_ID"] == "1":
  sys.exit("cause of death")
time.sleep(60)
"""
  started = time.monotonic()
  with pytest.raises(LaunchError, match="process 1 of 2 ended with return code 1") as error:
    run_python(code, processes=2, devices=1)
  assert "cause of death" in str(error.value)
  assert error.value.results[0].returncode == -9
  assert time.monotonic() - started < 30


def test_launcher_kills_everything_when_time_is_up(tmp_path):
  # The child of the process must also die.
  code = f"""
import pathlib, subprocess, sys, time
child = "import pathlib, time; time.sleep(4); pathlib.Path('{tmp_path}/alive').touch()"
subprocess.Popen([sys.executable, "-c", child])
print("before", flush=True)
time.sleep(60)
"""
  with pytest.raises(LaunchError, match=r"processes \[0\] of 1 still ran after 2 s") as error:
    run_python(code, processes=1, devices=1, timeout=2)
  assert "before" in str(error.value)
  time.sleep(4)
  assert not (tmp_path / "alive").exists()


def test_launcher_environment():
  code = "import os; print({k: v for k, v in os.environ.items() if k.startswith(('OV_', 'X'))})"
  (single,) = run_python(code, processes=1, devices=3, env={"OV_X": "1"})
  assert "OV_COORDINATOR" not in single.stdout and "'OV_X': '1'" in single.stdout
  assert "device_count=3" in single.stdout
  both = run_python(code, processes=2, devices=1, per_process_env=[{"OV_X": "a"}, {"OV_X": "b"}])
  assert ["'OV_X': 'a'" in both[0].stdout, "'OV_X': 'b'" in both[1].stdout] == [True, True]
  assert "'OV_PROCESS_ID': '1'" in both[1].stdout


def failed_start(code, **env):
  """Start only one of two processes and return its error."""
  variables = {"OV_COORDINATOR": f"127.0.0.1:{free_port()}", "OV_NUM_PROCESSES": "2", **env}
  with pytest.raises(LaunchError) as error:
    run_python(code, processes=1, devices=1, env=variables, timeout=60)
  result: Result = error.value.results[0]
  return result.stderr, variables["OV_COORDINATOR"]


def test_missing_coordinator_is_reported():
  code = "import ov_sharding; ov_sharding.initialize(timeout_seconds=2)"
  stderr, coordinator = failed_start(code, OV_PROCESS_ID="1")
  assert f"process 1 of 2: nothing listens at coordinator {coordinator} after 2 s" in stderr


def test_missing_peer_is_reported_with_the_coordinator():
  code = "import ov_sharding; ov_sharding.initialize(timeout_seconds=2)"
  stderr, coordinator = failed_start(code, OV_PROCESS_ID="0")
  assert f"Still waiting for the other processes after 1 s (coordinator {coordinator}" in stderr
  assert "Start-up failed: not all processes connected within 2 s" in stderr


def test_initialize_too_late_or_twice():
  code = """
import jax, ov_sharding
jax.devices()
ov_sharding.initialize(timeout_seconds=2)
"""
  stderr, coordinator = failed_start(code, OV_PROCESS_ID="0")
  assert f"start-up failed (coordinator {coordinator}, process 0 of 2)" in stderr
  assert "must be called before any JAX calls" in stderr

  twice = "import ov_sharding; ov_sharding.initialize(); ov_sharding.initialize()"
  with pytest.raises(LaunchError, match="was already called in this process; call it once"):
    run_python(twice, processes=2, devices=1, timeout=60)
