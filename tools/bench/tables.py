"""Results as Markdown: for the terminal, and for docs/benchmarks.md between two marks.

A page has plots, too, in a folder beside it that is named as the page: docs/benchmarks/.
"""

from collections.abc import Sequence
from pathlib import Path
import re
from typing import Any

from tools.bench import plots
from tools.bench.harness import METRICS


def render(found: dict[str, Any]) -> str:
  """All benchmarks of a file of `results`."""
  return "\n\n".join(section(found, benchmark) for benchmark in found["benchmarks"])


def section(found: dict[str, Any], benchmark: dict[str, Any]) -> str:
  """Conditions, figures, ratios, goals, notes of one benchmark."""
  machine = found["machine"]
  model = [benchmark["dtype"], benchmark["batch"] and f"batch {benchmark['batch']}"]
  facts = [
    f"{machine['cores']} cores of {machine['cpu']} ({machine['system']}), {machine['device']}",
    f"Python {machine['python']}",
    f"jax {machine['jax']}",
    *filter(None, model),
    found["date"],
    f"`{found['command']}`",
  ]
  rows = [row for row in benchmark["rows"] if not row["ratio"]]
  ratios = [row for row in benchmark["rows"] if row["ratio"]]
  exact = "Exact: the same in every round."
  spread = f"Median of {benchmark['rounds']} rounds (lowest to highest)."
  head = f"{benchmark['about']} {exact if benchmark['exact'] else spread}"
  parts = [head, ", ".join(facts) + "."]
  parts += [_table(benchmark["name"], rows)]
  if ratios:
    parts += [_table("ratio within a round", ratios)]
  if benchmark["goals"]:
    parts += [_goals(benchmark["goals"])]
  return "\n\n".join([*parts, *(f"{note}." for note in benchmark["notes"])])


def _table(title: str, rows: list[dict[str, Any]]) -> str:
  metrics = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
  lines = [[title, *(METRICS[name].heading for name in metrics)]]
  for row in rows:
    cells = (_cell(name, row["metrics"].get(name)) for name in metrics)
    lines.append([row["name"], *cells])
  return _aligned(lines)


def _cell(metric: str, figure: dict[str, Any] | None) -> str:
  if figure is None:
    return ""
  if METRICS[metric].exact and isinstance(figure["median"], int):  # a count, however small
    return f"{figure['median']:,}"
  if figure["low"] == figure["high"]:
    return _number(figure["median"])
  low, high = _number(figure["low"]), _number(figure["high"])
  return f"{_number(figure['median'])} ({low} to {high})"


def _number(value: float) -> str:
  """Three digits and more; whole numbers from 1,000 on, as counts are."""
  if value >= 100:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.1f}"
  return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def _goals(goals: list[dict[str, Any]]) -> str:
  lines = [["goal", "wanted", "found", "found : wanted", ""]]
  for goal in goals:
    share = f"{goal['value'] / goal['limit']:.2f}"
    outcome = "reached" if goal["reached"] else "not reached"
    name = f"{goal['row']}, {METRICS[goal['metric']].heading}"
    wanted = f"{'at least' if goal['at_least'] else 'at most'} {_number(goal['limit'])}"
    lines.append([name, wanted, _number(goal["value"]), share, outcome])
  return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rows = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
  rows.insert(1, ["-" * width for width in widths])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check_page(page: Path, names: Sequence[str]) -> None:
  """Raises OSError or ValueError where `put_into` would."""
  for name in names:
    _split(page, page.read_text("utf-8"), name)


def put_into(page: Path, found: dict[str, Any]) -> None:
  """Puts each benchmark between its marks, `<!-- bench NAME -->` and `<!-- end NAME -->`.

  Its plots are drawn anew; those that stood there and are none of it any more are removed.

  Raises:
    OSError: the page or a plot cannot be read or written.
    ValueError: it has no such marks.
  """
  text = page.read_text("utf-8")
  folder = page.with_suffix("")
  for benchmark in found["benchmarks"]:
    before, old, after = _split(page, text, benchmark["name"])
    drawn = {plots.file_name(benchmark, plot): plot for plot in benchmark["plots"]}
    shown = rf"^!\[.*\]\({re.escape(folder.name)}/([\w-]+\.svg)\)$"
    for name in re.findall(shown, old, re.MULTILINE):
      (folder / name).unlink(missing_ok=True)
    for name, plot in drawn.items():
      folder.mkdir(exist_ok=True)
      (folder / name).write_text(plots.draw(benchmark, plot), "utf-8")
    images = [f"![{plot['title']}]({folder.name}/{name})" for name, plot in drawn.items()]
    text = before + "\n\n".join([section(found, benchmark), *images]) + "\n" + after
  page.write_text(text, "utf-8")


def _split(page: Path, text: str, name: str) -> tuple[str, str, str]:
  """What stands up to the first mark, between them, and from the second on; marks outside."""
  begin, end = f"<!-- bench {name} -->\n", f"<!-- end {name} -->"
  before, first, rest = text.partition(begin)
  between, second, after = rest.partition(end)
  if not first or not second:
    raise ValueError(f"{page} has no place for {name}: expected {begin.strip()} and {end}")
  return before + begin, between, end + after
