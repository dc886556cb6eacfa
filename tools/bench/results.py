"""Results file of a benchmark run: metrics, machine, date and command."""

from collections.abc import Sequence
import dataclasses
import datetime
import json
import os
from pathlib import Path
import platform
from typing import Any, Literal

import msgspec

from tools.bench.harness import Benchmark, Values, summary

SCHEMA = 2

# The fields that `read` requires. Other fields, such as those of older versions, are ignored.


class _Machine(msgspec.Struct):
  cpu: str
  cores: int
  system: str
  python: str
  jax: str
  device: str


class _Number(msgspec.Struct):
  values: list[int | float]
  median: int | float
  low: int | float
  high: int | float


class _Row(msgspec.Struct):
  name: str
  ratio: bool
  metrics: dict[str, _Number]


class _Goal(msgspec.Struct):
  row: str
  metric: str
  limit: int | float
  at_least: bool
  value: int | float
  reached: bool


class _Benchmark(msgspec.Struct):
  name: str
  about: str
  dtype: str | None
  batch: int | None
  rounds: int
  exact: bool
  notes: list[str]
  rows: list[_Row]
  goals: list[_Goal]


class _File(msgspec.Struct):
  schema: Literal[2]
  date: str
  command: str
  machine: _Machine
  benchmarks: list[_Benchmark]


def to_dict(measured: Sequence[tuple[Benchmark, Values, int]], command: str) -> dict[str, Any]:
  """Return the content of the file.

  Args:
    measured: each benchmark with its result of `harness.measure` and its number of rounds.
    command: the command that ran the benchmarks.
  """
  return {
    "schema": SCHEMA,
    "date": datetime.date.today().isoformat(),
    "command": command,
    "machine": machine(),
    "benchmarks": [_benchmark(*one) for one in measured],
  }


def machine() -> dict[str, Any]:
  """Return the hardware and software versions; imports jax and opens its devices."""
  import jax

  info = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
  models = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
  return {
    "cpu": next(models, platform.processor() or "unknown"),
    "cores": len(os.sched_getaffinity(0)),
    "system": f"{platform.system()} {platform.machine()}",
    "python": platform.python_version(),
    "jax": jax.__version__,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }


def _benchmark(benchmark: Benchmark, values: Values, rounds: int) -> dict[str, Any]:
  ratios = {ratio.name for ratio in benchmark.ratios}
  rows = [
    {
      "name": name,
      "ratio": name in ratios,
      "metrics": {metric: {"values": of, **summary(of)} for metric, of in metrics.items()},
    }
    for name, metrics in values.items()
  ]
  goals = []
  for goal in benchmark.goals:
    value = summary(values[goal.row][goal.metric])["median"]
    outcome = {"value": value, "reached": goal.reached(value)}
    goals.append(dataclasses.asdict(goal) | outcome)
  fields = ("name", "about", "dtype", "batch", "exact")
  facts = {field: getattr(benchmark, field) for field in fields}
  return facts | {
    "rounds": rounds, "notes": list(benchmark.notes), "rows": rows, "goals": goals,
  }  # fmt: skip


def read(path: str) -> dict[str, Any]:
  """Read a results file.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if the file was not written by --out.
  """
  try:
    found = json.loads(Path(path).expanduser().read_text("utf-8"))
    msgspec.convert(found, _File)
  except (ValueError, msgspec.ValidationError) as error:
    raise ValueError(f"{path} is not a file of --out: {error}") from error
  return found
