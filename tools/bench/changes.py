"""Compare two --out files and report metrics that became worse by more than the noise.

CPU seconds, and rates per CPU second, differ if the ranges of their rounds do not overlap and the
medians differ by more than `MARGIN`. With five rounds each, the ranges of equal programs are
disjoint by chance once in 126 comparisons. Counts must be equal. Clock time is not compared because
it depends on the load of the machine. Between two machines, only ratios within a round are
compared.
"""

from typing import Any

from tools.bench import results
from tools.bench.harness import METRICS, Metric

MARGIN = 0.05
ROUNDS = 5  # fewer rounds do not show the noise
_MACHINE = ("cpu", "cores", "system", "device")  # what timings also depend on


def compare(old_path: str, new_path: str) -> tuple[str, bool]:
  """Return the report, and whether any metric became worse.

  Raises:
    OSError, ValueError: if a file cannot be read, or the two cannot be compared.
  """
  old, new = results.read(old_path), results.read(new_path)
  same = all(old["machine"][name] == new["machine"][name] for name in _MACHINE)
  before = {benchmark["name"]: benchmark for benchmark in old["benchmarks"]}
  worse: list[str] = []
  better: list[str] = []
  alike = 0
  for benchmark in new["benchmarks"]:
    if benchmark["name"] not in before:
      continue
    _check(before[benchmark["name"]], benchmark)
    rows = {row["name"]: row for row in before[benchmark["name"]]["rows"]}
    for row in benchmark["rows"]:
      for metric, value in row["metrics"].items():
        earlier = rows.get(row["name"], {"metrics": {}})["metrics"].get(metric)
        kind = METRICS.get(metric)
        if (
          kind is None
          or earlier is None
          or not _judged(kind, ratio=row["ratio"], same_machine=same)
        ):
          continue
        change = _change(kind, earlier, value)
        words = ("larger", "smaller") if kind.exact else ("slower", "faster")
        words = words[::-1] if kind.exact and kind.more else words
        line = f"{benchmark['name']}: {row['name']}, {kind.heading}: "
        line += f"{earlier['median']:.4g} -> {value['median']:.4g}"
        if earlier["median"]:
          line += f" ({value['median'] / earlier['median'] - 1:+.1%})"
        if change > 0:
          worse.append(f"{words[0]:8}{line}")
        elif change < 0:
          better.append(f"{words[1]:8}{line}")
        else:
          alike += 1
  if not (worse or better or alike):
    raise ValueError(f"{old_path} and {new_path} have no number in common")
  notes = [f"{len(worse)} worse, {len(better)} better, {alike} within noise"]
  if not same:
    notes.append("other machine: only counts and ratios were compared")
  if old["machine"]["jax"] != new["machine"]["jax"]:
    notes.append(f"jax {old['machine']['jax']} before, {new['machine']['jax']} now")
  return "\n".join([*worse, *better, "; ".join(notes)]), bool(worse)


def _check(old: dict[str, Any], new: dict[str, Any]) -> None:
  for name in ("dtype", "batch"):
    if old[name] != new[name]:
      raise ValueError(f"{new['name']}: {name} was {old[name]} and is {new[name]}; expected equal")
  if new["exact"]:
    return
  if rounds := [one["rounds"] for one in (old, new) if one["rounds"] < ROUNDS]:
    raise ValueError(f"{new['name']} ran {rounds[0]} rounds; expected --rounds={ROUNDS} or more")


def _judged(kind: Metric, *, ratio: bool, same_machine: bool) -> bool:
  """Return whether to compare a metric; ratios only if their cases cannot be compared directly."""
  if kind.exact:
    return not ratio
  return kind.judged and ratio != same_machine


def _change(kind: Metric, old: dict[str, Any], new: dict[str, Any]) -> int:
  """Return 1 if the metric became worse, -1 if better, otherwise 0."""
  if kind.more:
    return -_grown(kind, old, new)
  return _grown(kind, old, new)


def _grown(kind: Metric, old: dict[str, Any], new: dict[str, Any]) -> int:
  """Return 1 if the value grew, -1 if it shrank, otherwise 0."""
  if kind.exact:
    return (new["median"] > old["median"]) - (new["median"] < old["median"])
  margin = 1 + MARGIN
  more = new["low"] > old["high"] and new["median"] > margin * old["median"]
  less = new["high"] < old["low"] and margin * new["median"] < old["median"]
  return more - less
