"""The file of a benchmark run: what was measured, on what machine, when, by which command."""

from collections.abc import Sequence
import dataclasses
import datetime
import json
import os
from pathlib import Path
import platform
from typing import Any

from tools.bench.harness import METRICS, Benchmark, Plot, Values, summary

SCHEMA = 2

# Keys of each level with the types of their values.
_FILE = {"schema": int, "date": str, "command": str, "machine": dict, "benchmarks": list}
_MACHINE = {"cpu": str, "cores": int, "system": str, "python": str, "jax": str, "device": str}
_BENCHMARK = {
  "name": str,
  "about": str,
  "dtype": (str, type(None)),
  "batch": (int, type(None)),
  "rounds": int,
  "exact": bool,
  "notes": list,
  "rows": list,
  "goals": list,
  "plots": list,
}
_ROW = {"name": str, "ratio": bool, "metrics": dict}
_NUMBER = (int, float)
_FIGURE = {"values": list, "median": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_GOAL = {
  "row": str,
  "metric": str,
  "limit": _NUMBER,
  "at_least": bool,
  "value": _NUMBER,
  "reached": bool,
}
_PLOT = {"title": str, "x_label": str, "metric": str, "lines": dict}


def to_dict(measured: Sequence[tuple[Benchmark, Values, int]], command: str) -> dict[str, Any]:
  """The content of the file.

  Args:
    measured: benchmarks, what `harness.measure` found, number of rounds.
    command: that was given.
  """
  return {
    "schema": SCHEMA,
    "date": datetime.date.today().isoformat(),
    "command": command,
    "machine": machine(),
    "benchmarks": [_benchmark(*one) for one in measured],
  }


def machine() -> dict[str, Any]:
  """What the figures depend on; imports jax and opens its devices."""
  import jax

  return {
    "cpu": _cpu_model(),
    "cores": len(os.sched_getaffinity(0)),
    "system": f"{platform.system()} {platform.machine()}",
    "python": platform.python_version(),
    "jax": jax.__version__,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }


def _cpu_model() -> str:
  for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.processor() or "unknown"


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
  return {
    "name": benchmark.name,
    "about": benchmark.about,
    "dtype": benchmark.dtype,
    "batch": benchmark.batch,
    "rounds": rounds,
    "exact": benchmark.exact,
    "notes": list(benchmark.notes),
    "rows": rows,
    "goals": goals,
    "plots": [_plot(plot) for plot in benchmark.plots],
  }


def _plot(plot: Plot) -> dict[str, Any]:
  lines = {label: [[x, row] for x, row in points] for label, points in plot.lines.items()}
  return {**dataclasses.asdict(plot), "lines": lines}


def read(path: str) -> dict[str, Any]:
  """The content of a file.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no such file.
  """
  try:
    found = json.loads(Path(path).expanduser().read_text("utf-8"))
    check(found)
  except ValueError as error:
    raise ValueError(f"{path} is no file of figures: {error}; --out makes one") from error
  return found


def check(found: Any) -> None:
  """Raises ValueError where something is not as `to_dict` writes it, naming the place."""
  _check("the file", found, _FILE)
  if found["schema"] != SCHEMA:
    raise ValueError(f"schema is {found['schema']}, expected {SCHEMA}")
  _check("machine", found["machine"], _MACHINE)
  for benchmark in found["benchmarks"]:
    _check("a benchmark", benchmark, _BENCHMARK)
    for row in benchmark["rows"]:
      _check(f"a row of {benchmark['name']}", row, _ROW)
      for metric, figure in row["metrics"].items():
        where = f"{row['name']}, {metric}"
        if metric not in METRICS:
          raise ValueError(f"{where} is unknown; there are {', '.join(METRICS)}")
        _check(where, figure, _FIGURE)
        if {name: figure[name] for name in ("median", "low", "high")} != summary(figure["values"]):
          raise ValueError(f"{where}: median, low and high are not those of the values")
    for goal in benchmark["goals"]:
      _check(f"a goal of {benchmark['name']}", goal, _GOAL)
    for plot in benchmark["plots"]:
      _check(f"a plot of {benchmark['name']}", plot, _PLOT)
      there = {row["name"] for row in benchmark["rows"] if plot["metric"] in row["metrics"]}
      if missing := {row for points in plot["lines"].values() for _, row in points} - there:
        raise ValueError(f"{plot['title']}: no row has {plot['metric']} of {sorted(missing)}")


def _check(where: str, found: Any, keys: dict[str, Any]) -> None:
  if not isinstance(found, dict) or set(found) != set(keys):
    there = sorted(found) if isinstance(found, dict) else type(found).__name__
    raise ValueError(f"{where} has {there}, expected {sorted(keys)}")
  for name, kind in keys.items():
    if not isinstance(found[name], kind):
      raise ValueError(f"{where}: {name} is {found[name]!r}, expected {kind}")
