"""Full disks, missing permissions and deleted workdirs give one-line errors; the run resumes."""

import errno
import os
import shutil
import subprocess
import sys
import time

import pytest

from apps.trainer.errors import TEMPORARY_FAILURE
from apps.trainer.sinks import compare_metrics
from tests.end_to_end import runner

STEPS = (
  "--config.total_steps=8",
  "--config.eval.every=4",
  "--config.optimizer.schedule.warmup_steps=0",
  "--config.tensorboard=True",
)

# Program that runs an app in which writes to matching paths fail with an error number.
_FAILING = """
import builtins, io, os, re, runpy, sys
pattern, number, app = re.compile(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
real_open, real_mkdir = builtins.open, os.mkdir

def check(path):
  if isinstance(path, str | os.PathLike) and pattern.search(os.fspath(path)):
    raise OSError(number, os.strerror(number), os.fspath(path))

def failing_open(path, mode="r", *args, **kwargs):
  if set(mode) & set("wax+"):
    check(path)
  return real_open(path, mode, *args, **kwargs)

def failing_mkdir(path, *args, **kwargs):
  check(path)
  return real_mkdir(path, *args, **kwargs)

builtins.open = io.open = failing_open
os.mkdir = failing_mkdir
sys.argv[:] = sys.argv[3:]
runpy.run_path(app, run_name="__main__")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
  """Run to completion, which fills the compile cache."""
  workdir = tmp_path_factory.mktemp("runs") / "trained"
  code, printed = runner.run(*runner.TINY, *STEPS, f"--workdir={workdir}", cache=cache)
  assert code == 0, printed
  return workdir


def run_failing(pattern, number, workdir, cache):
  """Return exit code and error lines of a run in which writes fail."""
  program = cache / "failing.py"
  program.write_text(_FAILING)
  code, printed = runner.run(
    pattern, str(int(number)), str(runner.CAPTION_TRAIN), *runner.TINY, *STEPS,
    f"--workdir={workdir}", cache=cache, app=program,
  )  # fmt: skip
  assert "Traceback" not in printed, printed
  return code, [line for line in printed.splitlines() if "error:" in line]


def test_a_run_resumes_after_a_full_disk_in_every_phase(trained, cache, tmp_path):
  workdir = tmp_path / "run"
  phases = (  # in the order of a run, so that each attempt gets further than the previous one
    (r"/run/[^/]*tokenizer", errno.ENOSPC, TEMPORARY_FAILURE, ""),
    (r"/run/config\.json", errno.ENOSPC, TEMPORARY_FAILURE, ""),
    (r"metrics\.jsonl", errno.ENOSPC, TEMPORARY_FAILURE, ""),
    (r"/run/tensorboard", errno.EACCES, 2, ""),
    (r"checkpoints/\d", errno.EACCES, 2, ""),
    (r"/run/evaluations/", errno.EDQUOT, TEMPORARY_FAILURE, "checkpoint of step 4 is complete"),
    (r"/run/report\.json", errno.EROFS, 2, "the checkpoint of step 8 is complete"),
    (r"/run/report\.html", errno.ENOSPC, TEMPORARY_FAILURE, "the checkpoint of step 8 is complete"),
  )
  for pattern, number, expected, saved in phases:
    code, lines = run_failing(pattern, number, workdir, cache)
    assert (code, len(lines)) == (expected, 1), (pattern, code, lines)
    print(lines[0])
    assert os.strerror(number) in lines[0] and str(workdir) in lines[0]
    assert saved in lines[0]
  code, printed = runner.run(*runner.TINY, *STEPS, f"--workdir={workdir}", cache=cache)
  assert code == 0, printed
  assert compare_metrics(trained / "metrics.jsonl", workdir / "metrics.jsonl") == []


def test_a_compile_cache_on_a_full_disk_does_not_stop_the_run(trained, cache, tmp_path):
  del trained  # only its compile cache is used
  code, lines = run_failing(r"/xla", errno.ENOSPC, tmp_path / "run", cache)
  assert (code, lines) == (0, [])


def test_a_deleted_workdir_gives_a_one_line_error(trained, cache, tmp_path):
  del trained  # only its compile cache is used
  workdir = tmp_path / "run"
  flags = (*runner.TINY, *STEPS, "--config.total_steps=5000", "--config.eval.every=0")
  process = runner.start(*flags, f"--workdir={workdir}", cache=cache)
  while not (workdir / "checkpoints" / "4").is_dir():
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  shutil.rmtree(workdir, ignore_errors=True)
  _, err = process.communicate(timeout=240)
  lines = [line for line in err.splitlines() if "error:" in line]
  assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in err, err
  assert str(workdir) in lines[0]
  print(lines[0])


def test_a_closed_output_stream_does_not_stop_the_run(trained, cache, tmp_path):
  workdir = tmp_path / "é犬"
  flags = [*runner.TINY, *STEPS, f"--workdir={workdir}"]
  done = subprocess.run(
    ["sh", "-c", '"$@" 2>&1 >/dev/full | head -1', "sh", sys.executable, runner.CAPTION_TRAIN]
    + flags,
    env=runner.environment(cache, LC_ALL="C", PYTHONUTF8="0"),
    timeout=240,
  )
  assert done.returncode == 0
  assert compare_metrics(trained / "metrics.jsonl", workdir / "metrics.jsonl") == []
  assert (workdir / "report.html").exists()
