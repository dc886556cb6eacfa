"""Cases that are run in turn, round after round, and what a round gives.

  benchmark = Benchmark("startup", "...", [Case("help/export", run), ...], ratios=[...])
  measured = measure(benchmark, rounds=5, say=print)

Rounds interleave the cases, so that what else the machine does hits all alike. A comparison is the
ratio of two cases within a round. A figure is the median over the rounds, with the lowest and the
highest beside it.
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
  """Something a case may give.

  Attributes:
    heading: of its column.
    exact: the same in every round; else it varies.
    more: whether more is better.
    judged: whether `--compare` says what became worse: not of the clock, which stretches with
      whatever else the machine does.
  """

  heading: str
  exact: bool = False
  more: bool = False
  judged: bool = True


# In the order of the tables. "CPU s" are seconds of all cores together.
METRICS: dict[str, Metric] = {
  "blocked_s": Metric("s before the next step", judged=False),
  "cpu_s": Metric("CPU s"),
  "clock_s": Metric("clock s", judged=False),
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
  "grown_mib": Metric("MiB more at the peak", judged=False),
  "file_mib": Metric("MiB on disk", judged=False),
  "state_mib": Metric("state MiB", exact=True),
  "temporary_mib": Metric("temporaries MiB", exact=True),
  "peak_mib": Metric("peak MiB", exact=True),
  "kept_mib": Metric("MiB kept per image", exact=True),
  "host_mib": Metric("MiB per image on the host", exact=True),
  "batch_16": Metric("batch on 16 GB", exact=True, more=True),
  "batch_24": Metric("24 GB", exact=True, more=True),
  "batch_40": Metric("40 GB", exact=True, more=True),
  "batch_80": Metric("80 GB", exact=True, more=True),
  "batch_141": Metric("141 GB", exact=True, more=True),
  "instructions": Metric("HLO instructions", exact=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing to measure.

  Attributes:
    name: of the row.
    run: does it once; gives a value for some of METRICS.
    warm_up: whether a first run is thrown away.
  """

  name: str
  run: Callable[[], Mapping[str, float]]
  warm_up: bool = True


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Case `case` in units of case `base`; the one that is to be small stands first."""

  case: str
  base: str

  @property
  def name(self) -> str:
    return f"{self.case} : {self.base}"


@dataclasses.dataclass(frozen=True)
class Goal:
  """The median of a row's metric is to be at most `limit`, or `at_least` it."""

  row: str
  metric: str
  limit: float
  at_least: bool = False

  def reached(self, value: float) -> bool:
    return value >= self.limit if self.at_least else value <= self.limit


@dataclasses.dataclass(frozen=True)
class Plot:
  """Curves of one metric, a point for each row.

  Attributes:
    title: above it, and of its file.
    x_label: what the numbers across are.
    metric: upwards.
    lines: label -> (number across, row), in order.
  """

  title: str
  x_label: str
  metric: str
  lines: Mapping[str, Sequence[tuple[float, str]]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Cases that belong into one table.

  Attributes:
    name: on the command line.
    about: what the rows are, for the reader of the table.
    dtype: of the model; None where there is none.
    batch: examples of a step; None where there is none.
    notes: such as what was left out, and why.
    exact: nothing it measures varies, so that one round says all.
  """

  name: str
  about: str
  cases: Sequence[Case]
  ratios: Sequence[Ratio] = ()
  goals: Sequence[Goal] = ()
  dtype: str | None = None
  batch: int | None = None
  notes: Sequence[str] = ()
  plots: Sequence[Plot] = ()
  exact: bool = False

  def only(self, wanted: Callable[[str], object]) -> "Benchmark":
    """The cases whose name is wanted, with the ratios and goals that are left."""
    cases = [case for case in self.cases if wanted(case.name)]
    names = {case.name for case in cases}
    ratios = [ratio for ratio in self.ratios if {ratio.case, ratio.base} <= names]
    rows = names | {ratio.name for ratio in ratios}
    goals = [goal for goal in self.goals if goal.row in rows]
    plots = []
    for plot in self.plots:
      lines = {
        label: [point for point in points if point[1] in rows]
        for label, points in plot.lines.items()
      }
      if lines := {label: points for label, points in lines.items() if points}:
        plots.append(dataclasses.replace(plot, lines=lines))
    return dataclasses.replace(self, cases=cases, ratios=ratios, goals=goals, plots=plots)


class Stopwatch:
  """Seconds since it was made or last read: of all threads of this process, and on the clock."""

  def __init__(self) -> None:
    self.read()

  def read(self) -> tuple[float, float]:
    """(CPU seconds, clock seconds); begins anew."""
    now = time.process_time(), time.perf_counter()
    before, self._since = getattr(self, "_since", now), now
    return now[0] - before[0], now[1] - before[1]


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
  """What `work` gives, and its seconds; it must not leave anything running."""
  watch = Stopwatch()
  found = work()
  cpu, clock = watch.read()
  return found, {"cpu_s": cpu, "clock_s": clock}


def measured(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
  """Like `timed`, and by how many MiB this process grew at most; without memory of devices."""
  Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak begins anew
  before, _ = resident_mib()
  found, seconds = timed(work)
  return found, {**seconds, "grown_mib": max(0.0, resident_mib()[1] - before)}


def resident_mib() -> tuple[float, float]:
  """Of this process, now and at its peak."""
  lines = Path("/proc/self/status").read_text("utf-8").splitlines()
  fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
  now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
  return now, peak


def rates(what: str, count: float, seconds: Mapping[str, float]) -> dict[str, float]:
  """`count` per second of the CPU and of the clock, under the names of METRICS."""
  return {
    f"{what}_per_cpu_s": count / seconds["cpu_s"],
    f"{what}_per_s": count / seconds["clock_s"],
  }


Values = dict[str, dict[str, list[float]]]  # row -> metric -> one value a round


def measure(benchmark: Benchmark, rounds: int, say: Callable[[str], None]) -> Values:
  """Runs every case `rounds` times, in turn; ratios are rows, too.

  Args:
    benchmark: what to run.
    rounds: at least 1.
    say: shows a line of progress.

  Raises:
    RuntimeError: an exact figure was not the same in every round.
  """
  values: Values = {case.name: {} for case in benchmark.cases}
  turns = [case for case in benchmark.cases if case.warm_up]
  warm_ups = len(turns)
  turns += list(benchmark.cases) * rounds
  took: dict[str, float] = {}  # seconds of the last run
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
  """Median, lowest and highest."""
  return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cpu_seconds_of(process: int) -> float:
  """CPU seconds that a process that still runs has used so far, all its threads together."""
  with open(f"/proc/{process}/stat", encoding="utf-8") as file:
    fields = file.read().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _duration(seconds: float | None) -> str:
  return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
