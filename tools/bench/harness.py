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
import statistics
import time

# What a case may give, in the order of the tables: heading, and how it behaves. Seconds of all
# cores ("cpu") and on the clock ("clock") vary; a count is the same in every round.
METRICS: dict[str, tuple[str, str]] = {
  "cpu_s": ("CPU s", "cpu"),
  "clock_s": ("clock s", "clock"),
  "trace_cpu_s": ("trace CPU s", "cpu"),
  "lower_cpu_s": ("lower CPU s", "cpu"),
  "compile_cpu_s": ("compile CPU s", "cpu"),
  "instructions": ("HLO instructions", "count"),
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
  """The median of a row's metric is to be at most `limit`."""

  row: str
  metric: str
  limit: float


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Cases that belong into one table.

  Attributes:
    name: on the command line.
    about: what the rows are, for the reader of the table.
    dtype: of the model; None where there is none.
    batch: examples of a step; None where there is none.
    notes: such as what was left out, and why.
  """

  name: str
  about: str
  cases: Sequence[Case]
  ratios: Sequence[Ratio] = ()
  goals: Sequence[Goal] = ()
  dtype: str | None = None
  batch: int | None = None
  notes: Sequence[str] = ()

  def only(self, wanted: Callable[[str], object]) -> "Benchmark":
    """The cases whose name is wanted, with the ratios and goals that are left."""
    cases = [case for case in self.cases if wanted(case.name)]
    names = {case.name for case in cases}
    ratios = [ratio for ratio in self.ratios if {ratio.case, ratio.base} <= names]
    rows = names | {ratio.name for ratio in ratios}
    goals = [goal for goal in self.goals if goal.row in rows]
    return dataclasses.replace(self, cases=cases, ratios=ratios, goals=goals)


class Stopwatch:
  """Seconds since it was made or last read: of all threads of this process, and on the clock."""

  def __init__(self) -> None:
    self.read()

  def read(self) -> tuple[float, float]:
    """(CPU seconds, clock seconds); begins anew."""
    now = time.process_time(), time.perf_counter()
    before, self._since = getattr(self, "_since", now), now
    return now[0] - before[0], now[1] - before[1]


Values = dict[str, dict[str, list[float]]]  # row -> metric -> one value a round


def measure(benchmark: Benchmark, rounds: int, say: Callable[[str], None]) -> Values:
  """Runs every case `rounds` times, in turn; ratios are rows, too.

  Args:
    benchmark: what to run.
    rounds: at least 1.
    say: shows a line of progress.

  Raises:
    RuntimeError: a count was not the same in every round.
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
      if METRICS[metric][1] == "count" and len(set(of_rounds)) > 1:
        raise RuntimeError(f"{row}: {metric} is a count, but was {of_rounds} in {rounds} rounds")
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
