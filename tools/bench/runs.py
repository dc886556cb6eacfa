"""Training runs as separate processes, with their cost."""

from collections.abc import Sequence
import json
from pathlib import Path
import resource
import subprocess
import time
from typing import NamedTuple

from apps.trainer.errors import UserError

ROOT = Path(__file__).parents[2]


class Cost(NamedTuple):
  """Cost of a process: seconds of all cores, and elapsed seconds."""

  cpu: float
  wall: float


def run_logged(command: Sequence[str], workdir: Path) -> Cost:
  """Run a program and append its output to workdir/log.txt; return its cost.

  Raises:
    UserError: if the program failed.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  start, before = time.monotonic(), _child_seconds()
  with (workdir / "log.txt").open("a") as log:
    code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
  if code:
    last = (["nothing"] + Path(log.name).read_text("utf-8", "replace").splitlines())[-1]
    raise UserError(f"{workdir} ended with exit code {code}: {last}; see {log.name}")
  return Cost(_child_seconds() - before, time.monotonic() - start)


def metrics(evaluation: Path) -> dict[str, float]:
  """Return the metrics of an evaluation by name, the first of each name."""
  results = json.loads(evaluation.read_text())["results"]
  return {row["name"]: float(row["value"]) for row in reversed(results)}


def _child_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime
