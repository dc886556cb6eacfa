"""Two runs in one workdir: the second is rejected, and a killed run delays no other."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.end_to_end import runner
from tests.end_to_end.fake_bucket import FakeBucket

_HOLD = """
import sys, time
from apps.trainer import errors, lock
from apps.trainer.workdir import open_workdir
lock.RENEW_SECONDS = 0.3

def main(arguments):
  with open_workdir(arguments[0], exclusive=True, log=print) as workdir:
    print("held", flush=True)
    time.sleep(float(arguments[1]))

errors.run_app(main, arguments=True)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


def hold(bucket, seconds, **variables):
  """Start a process that locks gs://bucket/run."""
  return subprocess.Popen(
    [sys.executable, "-c", _HOLD, "gs://bucket/run", str(seconds)],
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
      **bucket.environment(),
      **variables,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_bucket_is_locked_by_one_run_until_it_is_killed(tmp_path):
  with FakeBucket("bucket", tmp_path) as bucket:
    first = hold(bucket, 100)
    assert first.stdout.readline() == "held\n"
    for _ in range(2):  # meanwhile the lease is renewed
      time.sleep(0.7)
      second = hold(bucket, 0)
      out, err = second.communicate(timeout=60)
      assert second.returncode == 2 and out == ""
      (line,) = (line for line in err.splitlines() if "error:" in line)
      assert "Traceback" not in err
      assert f"--workdir=gs://bucket/run is in use by process {first.pid} on " in line
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert "run/run.lock" in bucket.objects
    third = hold(bucket, 0)
    out, err = third.communicate(timeout=60)
    assert (third.returncode, out) == (0, "held\n"), err  # no other log lines
    assert "run/run.lock" not in bucket.objects
    assert bucket.unknown == []


def test_a_second_start_is_rejected_and_the_run_resumes_after_kill_9(cache, tmp_path):
  flags = (*runner.TINY, f"--workdir={tmp_path}/run", "--config.eval.every=0")
  first = runner.start(*flags, "--config.total_steps=20000", cache=cache)
  checkpoints = tmp_path / "run" / "checkpoints"
  while not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
    assert first.poll() is None, first.communicate()
    time.sleep(0.05)
  for more in ((), ("--config.eval_only=True",)):
    code, printed = runner.run(*flags, *more, cache=cache)
    runner.expect_one_line(printed, code, rf"run is in use by process {first.pid} on .*kill")
  assert first.poll() is None
  first.send_signal(signal.SIGKILL)
  first.communicate()
  code, printed = runner.run(*flags, "--config.eval_only=True", cache=cache)
  assert code == 0 and "restoring step" in printed, printed
  assert not (tmp_path / "run" / "run.lock").exists()
