"""What became slower or larger between two files of figures, beyond noise.

CPU seconds, and what is done in one, differ where the ranges of their rounds do not overlap and the
medians are more than `MARGIN` apart: with five rounds each, ranges of equal programs part by chance
once in 126 figures. A count differs where it is not equal. The clock is not judged, for other work
on the machine stretches it. Between two machines seconds say nothing: there the ratios within a
round are judged.
"""

from typing import Any

from tools.bench import results
from tools.bench.harness import METRICS, Metric

MARGIN = 0.05
ROUNDS = 5  # fewer say too little of the noise
_MACHINE = ("cpu", "cores", "system", "device")  # what seconds depend on beside the programs


def compare(old_path: str, new_path: str) -> tuple[str, bool]:
  """(what changed, whether anything became worse).

  Raises:
    OSError, ValueError: files that cannot be read, or compared.
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
      for metric, figure in row["metrics"].items():
        earlier = rows.get(row["name"], {"metrics": {}})["metrics"].get(metric)
        kind = METRICS[metric]
        if earlier is None or not _judged(kind, ratio=row["ratio"], same_machine=same):
          continue
        change = _change(kind, earlier, figure)
        words = ("larger", "smaller") if kind.exact else ("slower", "faster")
        words = words[::-1] if kind.exact and kind.more else words
        line = f"{benchmark['name']}: {row['name']}, {kind.heading}: "
        line += f"{earlier['median']:.4g} -> {figure['median']:.4g}"
        if earlier["median"]:
          line += f" ({figure['median'] / earlier['median'] - 1:+.1%})"
        if change > 0:
          worse.append(f"{words[0]:8}{line}")
        elif change < 0:
          better.append(f"{words[1]:8}{line}")
        else:
          alike += 1
  if not (worse or better or alike):
    raise ValueError(f"{old_path} and {new_path} have no figure in common")
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
  """A ratio moves with either of its cases, so it is judged only where they cannot be."""
  if kind.exact:
    return not ratio
  return kind.judged and ratio != same_machine


def _change(kind: Metric, old: dict[str, Any], new: dict[str, Any]) -> int:
  """1 for worse, -1 for better, 0 for neither."""
  if kind.more:
    return -_grown(kind, old, new)
  return _grown(kind, old, new)


def _grown(kind: Metric, old: dict[str, Any], new: dict[str, Any]) -> int:
  """1 for more, -1 for less, 0 for neither."""
  if kind.exact:
    return (new["median"] > old["median"]) - (new["median"] < old["median"])
  margin = 1 + MARGIN
  more = new["low"] > old["high"] and new["median"] > margin * old["median"]
  less = new["high"] < old["low"] and margin * new["median"] < old["median"]
  return more - less
