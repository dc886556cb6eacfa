"""Benchmark harness: runs cases in interleaved rounds and records the metrics of each round.

  benchmark = Benchmark("startup", "...", [Case("help/export", run), ...], ratios=[...])
  measured = measure(benchmark, rounds=5, say=print)

Interleaving spreads the effect of other load on the machine over all cases. Cases are compared by
their ratio within a round. Results are the median and range over the rounds.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import os
from pathlib import Path
import statistics
import time
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Metric:
  """A metric that a case may return.

  Attributes:
    heading: column heading.
    exact: whether the value must be the same in every round.
    more: whether higher is better.
    judged: whether `--compare` reports changes. False for clock time, which depends on the load of
      the machine.
  """

  heading: str
  exact: bool = False
  more: bool = False
  judged: bool = True


# In table order. "CPU s" is summed over all cores.
METRICS: dict[str, Metric] = {
  "blocked_s": Metric("s before the next step", judged=False),
  "cpu_s": Metric("CPU s"),
  "clock_s": Metric("wall s", judged=False),
  "trace_cpu_s": Metric("trace CPU s"),
  "lower_cpu_s": Metric("lower CPU s"),
  "compile_cpu_s": Metric("compile CPU s"),
  "images_per_cpu_s": Metric("images per CPU s", more=True),
  "images_per_s": Metric("images/s", more=True, judged=False),
  "tokens_per_cpu_s": Metric("tokens per CPU s", more=True),
  "tokens_per_s": Metric("tokens/s", more=True, judged=False),
  "texts_per_cpu_s": Metric("texts per CPU s", more=True),
  "texts_per_s": Metric("texts/s", more=True, judged=False),
  "mb_per_cpu_s": Metric("MB per CPU s", more=True),
  "mb_per_s": Metric("MB/s", more=True, judged=False),
  "gflops": Metric("GFLOP", exact=True),
  "gflops_per_cpu_s": Metric("GFLOP per CPU s", more=True),
  "mfu": Metric("MFU", more=True, judged=False),
  "resident_mib": Metric("resident MiB", judged=False),
  "grown_mib": Metric("added peak MiB", judged=False),
  "file_mib": Metric("MiB on disk", judged=False),
  "state_mib": Metric("state MiB", exact=True),
  "temporary_mib": Metric("temporaries MiB", exact=True),
  "peak_mib": Metric("peak MiB", exact=True),
  "instructions": Metric("HLO instructions", exact=True),
  "loss_early": Metric("loss, early", judged=False),
  "loss_late": Metric("loss, late", judged=False),
  "grad_early": Metric("gradient norm, early", judged=False),
  "grad_late": Metric("gradient norm, late", judged=False),
  "scale_late": Metric("scale, end", judged=False),
  "weights": Metric("weights, end", judged=False),
  "bands": Metric("noise bands", judged=False),
  "found_at": Metric("found at step", exact=True, judged=False),
  "held_out_ours": Metric("held-out, OpenVision", judged=False),
  "held_out_torch": Metric("held-out, PyTorch", judged=False),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One case of a benchmark.

  Attributes:
    name: row name.
    run: function that runs the case once and returns values for some of METRICS.
    warm_up: whether the first run is discarded.
  """

  name: str
  run: Callable[[], Mapping[str, float]]
  warm_up: bool = True


@dataclasses.dataclass(frozen=True)
class Ratio:
  """The metrics of case `case` divided by those of case `base`."""

  case: str
  base: str

  @property
  def name(self) -> str:
    return f"{self.case} : {self.base}"


@dataclasses.dataclass(frozen=True)
class Goal:
  """Limit on the median of a metric: an upper bound, or a lower bound if `at_least`."""

  row: str
  metric: str
  limit: float
  at_least: bool = False

  def reached(self, value: float) -> bool:
    return value >= self.limit if self.at_least else value <= self.limit


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """The cases of one table.

  Attributes:
    name: name on the command line.
    about: description of the rows, shown with the table.
    dtype: dtype of the model, or None if there is no model.
    batch: batch size, or None if there is no batch.
    notes: remarks, such as which cases were left out and why.
    exact: whether all metrics are deterministic, so that one round is enough.
  """

  name: str
  about: str
  cases: Sequence[Case]
  ratios: Sequence[Ratio] = ()
  goals: Sequence[Goal] = ()
  dtype: str | None = None
  batch: int | None = None
  notes: Sequence[str] = ()
  exact: bool = False

  def only(self, wanted: Callable[[str], object]) -> "Benchmark":
    """Return the benchmark restricted to the cases with matching names, their ratios and goals."""
    cases = [case for case in self.cases if wanted(case.name)]
    names = {case.name for case in cases}
    ratios = [ratio for ratio in self.ratios if {ratio.case, ratio.base} <= names]
    rows = names | {ratio.name for ratio in ratios}
    goals = [goal for goal in self.goals if goal.row in rows]
    return dataclasses.replace(self, cases=cases, ratios=ratios, goals=goals)


class Stopwatch:
  """Measures CPU time of this process and clock time since the last reading."""

  def __init__(self) -> None:
    self.read()

  def read(self) -> tuple[float, float]:
    """Return (CPU seconds, clock seconds), and restart."""
    now = time.process_time(), time.perf_counter()
    before, self._since = getattr(self, "_since", now), now
    return now[0] - before[0], now[1] - before[1]


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
  """Return the result of `work` and its seconds; all its work must end before it returns."""
  watch = Stopwatch()
  found = work()
  cpu, clock = watch.read()
  return found, {"cpu_s": cpu, "clock_s": clock}


def measured(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
  """Run `work` like `timed`, and add the peak growth of host memory in MiB."""
  Path("/proc/self/clear_refs").write_text("5", "ascii")  # reset the peak
  before, _ = resident_mib()
  found, seconds = timed(work)
  return found, {**seconds, "grown_mib": max(0.0, resident_mib()[1] - before)}


def resident_mib() -> tuple[float, float]:
  """Return the current and the peak resident memory of this process."""
  lines = Path("/proc/self/status").read_text("utf-8").splitlines()
  fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
  now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
  return now, peak


def rates(what: str, count: float, seconds: Mapping[str, float]) -> dict[str, float]:
  """Return `count` per CPU second and per clock second, under their names in METRICS."""
  return {
    f"{what}_per_cpu_s": count / seconds["cpu_s"],
    f"{what}_per_s": count / seconds["clock_s"],
  }


Values = dict[str, dict[str, list[float]]]  # row -> metric -> one value per round


def measure(benchmark: Benchmark, rounds: int, say: Callable[[str], None]) -> Values:
  """Run every case `rounds` times in interleaved order. Ratios become additional rows.

  Args:
    benchmark: the cases to run.
    rounds: number of rounds, at least 1.
    say: function that prints a progress line.

  Raises:
    RuntimeError: if an exact metric differs between rounds.
  """
  values: Values = {case.name: {} for case in benchmark.cases}
  turns = [case for case in benchmark.cases if case.warm_up]
  warm_ups = len(turns)
  turns += list(benchmark.cases) * rounds
  took: dict[str, float] = {}  # duration of the last run in seconds
  for number, case in enumerate(turns):
    left = [took.get(turn.name) for turn in turns[number:]]
    known = [seconds for seconds in left if seconds is not None]
    eta = sum(known) * len(left) / len(known) if known else None
    what = "warming up" if number < warm_ups else "running"
    say(f"{benchmark.name} {number + 1}/{len(turns)}  eta {_duration(eta)}  {what} {case.name}")
    watch = Stopwatch()
    found = case.run()
    took[case.name] = watch.read()[1]
    if number >= warm_ups:
      for metric, value in found.items():
        values[case.name].setdefault(metric, []).append(value)
  for row, metrics in values.items():
    for metric, of_rounds in metrics.items():
      if METRICS[metric].exact and len(set(of_rounds)) > 1:
        raise RuntimeError(f"{row}: {metric} is exact, but was {of_rounds} in {rounds} rounds")
  for ratio in benchmark.ratios:
    above, below = values[ratio.case], values[ratio.base]
    values[ratio.name] = {
      metric: [a / b for a, b in zip(above[metric], below[metric], strict=True)]
      for metric in above
      if metric in below and all(below[metric])
    }
  return values


def summary(values: Sequence[float]) -> dict[str, float]:
  """Return median, minimum and maximum."""
  return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cpu_seconds_of(process: int) -> float:
  """Return the CPU seconds used so far by all threads of a running process."""
  with open(f"/proc/{process}/stat", encoding="utf-8") as file:
    fields = file.read().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _duration(seconds: float | None) -> str:
  return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
