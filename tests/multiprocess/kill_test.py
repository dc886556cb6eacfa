"""A run of four processes in which one, and later process 0, is killed gives unchanged metrics.

metrics.jsonl must be bitwise equal to that of an uninterrupted run. It contains the loss of every
step, which depends on every example of the batch, and the number of examples. The checkpoint of the
last step contains the position of the loader.
"""

import json
from pathlib import Path
import re
import signal
import time

import pytest

from apps.trainer.checkpoint import find_checkpoint, read_metadata
from apps.trainer.sinks import compare_metrics, read_metrics
from tests.end_to_end import runner
from tests.multiprocess.launcher import Group

STEPS, EVERY = 12, 4
FLAGS = (
  *runner.TINY,
  f"--config.total_steps={STEPS}",
  f"--config.checkpoint.every={EVERY}",
  f"--config.eval.every={STEPS}",
)
LIMIT = 600  # seconds; an idle machine takes twenty


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Create the home directory of all runs, which contains their compile cache."""
  return tmp_path_factory.mktemp("home")


def start(workdir: Path, home: Path) -> Group:
  return Group(
    [str(runner.CAPTION_TRAIN), *FLAGS, f"--workdir={workdir}"],
    processes=4,
    devices=1,
    env=runner.environment(home),
  )


def run(workdir: Path, home: Path) -> None:
  with start(workdir, home) as group:
    assert group.wait(LIMIT)
    assert [r.returncode for r in group.results()] == [0] * 4, group.results()


def kill(workdir: Path, home: Path, victim: int, step: int) -> None:
  """Start the run, kill a process after `step` steps, and check how the others end."""
  with start(workdir, home) as group:
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + LIMIT
    while not path.exists() or not any(m["step"] >= step for m in read_metrics(path)):
      assert group.codes() == [None] * 4 and time.monotonic() < deadline, group.printed(0)
      time.sleep(0.02)
    group.running[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert group.wait(LIMIT)
    print(f"process {victim} killed: all ended after {time.monotonic() - killed:.1f} s")
    results = group.results()
  for index, result in enumerate(results):
    if index != victim:
      assert result.returncode == 75, result.stderr
      last = result.stderr.splitlines()[-1]
      said = (
        rf"caption_train: error: process {victim} \(.+\) is gone: .+; last checkpoint: step \d+"
      )
      assert re.match(said, last), result.stderr
      print(last)


def test_no_example_is_lost_or_repeated(tmp_path: Path, home: Path):
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  run(undisturbed, home)
  kill(killed, home, victim=2, step=6)
  kill(killed, home, victim=0, step=10)
  run(killed, home)

  assert not compare_metrics(undisturbed / "metrics.jsonl", killed / "metrics.jsonl")
  lines = [line for line in read_metrics(killed / "metrics.jsonl") if "train/examples" in line]
  assert [line["train/examples"] for line in lines] == [16 * step for step in range(1, STEPS + 1)]
  loaders = [read_metadata(find_checkpoint(path))["loader"] for path in (undisturbed, killed)]
  print(f"loader after step {STEPS}: {json.dumps(loaders[1])}")
  assert loaders[0] == loaders[1]
