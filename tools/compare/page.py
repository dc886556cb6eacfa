"""Self-contained HTML page of a comparison: table, curves over samples seen, bar charts."""

from collections.abc import Sequence
import math
from pathlib import Path
from typing import Any

from apps.trainer import charts, report_text
from ov_eval import Result
from tools.compare.evaluations import Column, Evaluation, labels, warnings

_COLOURS = 8  # colors in the style of the page; further runs repeat them with dashed lines
_OPEN = 6  # charts that are initially expanded


def render(
  rows: Sequence[Evaluation],
  columns: Sequence[Column],
  everything: Sequence[Evaluation],
  all_columns: Sequence[Column],
) -> str:
  """Return the HTML of the page. All text is escaped, and no external resource is loaded.

  Args:
    rows: rows of the table.
    columns: columns for `rows`.
    everything: the rows and the earlier evaluations of their runs.
    all_columns: columns for `everything`.
  """
  runs = list(dict.fromkeys(e.run for e in everything))
  names = labels(rows)
  drawn = [_curves(column, everything, runs) for column in all_columns]
  curves = [chart for chart in drawn if chart]
  several = len({row.run for row in rows}) > 1
  bars = [_bars(column, rows, names, runs) for column in columns] if several else []
  of_rows = warnings(columns, names, report_text.label)
  of_runs = warnings(all_columns, [e.run for e in everything], report_text.label)
  template = report_text.template(Path(__file__).with_name("page_template.html"))
  return template.render(
    title=" and ".join(runs) if len(runs) < 3 else f"{len(runs)} models",
    rows=[
      {"name": name, "step": row.step, "seen": row.examples_seen, "colour": _colour(row.run, runs)}
      for name, row in zip(names, rows, strict=True)
    ],
    columns=columns,
    warnings=of_rows,
    levels=[f"{level:.0%}" for level in sorted({row.level for row in rows})],
    legend=[{"name": run, "colour": _colour(run, runs)} for run in runs],
    curves=curves[:_OPEN],
    more_curves=curves[_OPEN:],
    curve_warnings=[text for text in of_runs if text not in of_rows],
    bars=[bar for bar in bars if bar][:_OPEN],
    more_bars=[bar for bar in bars if bar][_OPEN:],
  )


def _colour(run: str, runs: Sequence[str]) -> str:
  """Return the CSS classes of a run's color."""
  number = runs.index(run)
  return f"c{number % _COLOURS}" + (" again" if number >= _COLOURS else "")


def _title(column: Column) -> str:
  return report_text.label(column.name) + (f", {column.detail}" if column.detail else "")


def _curves(
  column: Column, everything: Sequence[Evaluation], runs: Sequence[str]
) -> dict[str, Any] | None:
  """Return a chart over samples seen, or None if no run was evaluated twice."""
  points: dict[str, list[tuple[float, float]]] = {}
  unit = ""
  for evaluation, result in zip(everything, column.results, strict=True):
    if result is not None and math.isfinite(result.value):
      points.setdefault(evaluation.run, []).append((evaluation.examples_seen, result.value))
      unit = result.unit
  if all(len(some) < 2 for some in points.values()):
    return None
  series = [charts.Series(run, sorted(some)) for run, some in points.items()]
  chart = charts.draw(
    _title(column), series, percent=unit == "share", smooth=False, x_name="samples seen"
  )
  colours = [_colour(run, runs) for run in points]
  return {"chart": chart, "colours": colours, "differs": bool(column.differences)}


def _bars(
  column: Column, rows: Sequence[Evaluation], names: Sequence[str], runs: Sequence[str]
) -> dict[str, Any] | None:
  """Return one bar for each row with the metric, or None if fewer than two rows have it."""
  shown = [
    (row, result)
    for row, result in enumerate(column.results)
    if result is not None and math.isfinite(result.value)
  ]
  if len(shown) < 2:
    return None
  ends = [max(result.value, _high(result)) for _, result in shown]
  full = charts.nice_ticks(0.0, max(*ends, 0.0))[-1]
  if shown[0][1].unit == "share":
    full = min(full, 1.0)
  return {
    "title": _title(column),
    "differs": bool(column.differences),
    "full": report_text.figure(Result("", full, 0, unit=shown[0][1].unit)),
    "bars": [
      {
        "name": names[row],
        "colour": _colour(rows[row].run, runs),
        "best": row in column.best,
        "result": result,
        "width": _percent(result.value / full),
        "left": _percent((result.low or 0.0) / full),
        "span": _percent((_high(result) - (result.low or 0.0)) / full),
      }
      for row, result in shown
    ],
  }


def _high(result: Result) -> float:
  return result.high if report_text.interval(result) and result.high else result.value


def _percent(fraction: float) -> float:
  return round(100 * min(max(fraction, 0.0), 1.0), 2)
