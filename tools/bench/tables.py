"""Format results as Markdown, for the terminal and for marked sections of docs/benchmarks.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.harness import METRICS


def render(found: dict[str, Any]) -> str:
  """Format all benchmarks of a results file."""
  return "\n\n".join(section(found, benchmark) for benchmark in found["benchmarks"])


def section(found: dict[str, Any], benchmark: dict[str, Any]) -> str:
  """Format conditions, metrics, ratios, goals and notes of one benchmark."""
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
  if METRICS[metric].exact and isinstance(figure["median"], int):  # a count, even if it is small
    return f"{figure['median']:,}"
  if figure["low"] == figure["high"]:
    return _number(figure["median"])
  low, high = _number(figure["low"]), _number(figure["high"])
  return f"{_number(figure['median'])} ({low} to {high})"


def _number(value: float) -> str:
  """Format with three significant digits, or as an integer from 1,000 on."""
  if value >= 100:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.1f}"
  return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def _goals(goals: list[dict[str, Any]]) -> str:
  lines = [["goal", "limit", "measured", "measured : limit", ""]]
  for goal in goals:
    fraction = f"{goal['value'] / goal['limit']:.2f}"
    outcome = "reached" if goal["reached"] else "not reached"
    name = f"{goal['row']}, {METRICS[goal['metric']].heading}"
    limit = f"{'at least' if goal['at_least'] else 'at most'} {_number(goal['limit'])}"
    lines.append([name, limit, _number(goal["value"]), fraction, outcome])
  return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rows = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
  rows.insert(1, ["-" * width for width in widths])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check_page(page: Path, names: Sequence[str]) -> None:
  """Raise OSError or ValueError if `put_into` would."""
  for name in names:
    _split(page, page.read_text("utf-8"), name)


def put_into(page: Path, found: dict[str, Any]) -> None:
  """Replace each benchmark between its marks, `<!-- bench NAME -->` and `<!-- end NAME -->`.

  Raises:
    OSError: if the page cannot be read or written.
    ValueError: if the page lacks a mark.
  """
  text = page.read_text("utf-8")
  for benchmark in found["benchmarks"]:
    before, _, after = _split(page, text, benchmark["name"])
    text = f"{before}{section(found, benchmark)}\n{after}"
  page.write_text(text, "utf-8")


def _split(page: Path, text: str, name: str) -> tuple[str, str, str]:
  """Split a page into the text up to the first mark, between the marks, and from the second on."""
  begin, end = f"<!-- bench {name} -->\n", f"<!-- end {name} -->"
  before, first, rest = text.partition(begin)
  between, second, after = rest.partition(end)
  if not first or not second:
    raise ValueError(f"{page} has no section of {name}; expected {begin.strip()} and {end}")
  return before + begin, between, end + after
