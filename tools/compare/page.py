"""The comparison as one self-contained page: table, curves over samples seen, bars."""

from collections.abc import Sequence
import functools
import math
from pathlib import Path
import re
from typing import Any

import jinja2

from apps.trainer import charts, report_text
from ov_eval import Result
from tools.compare.evaluations import Column, Evaluation, labels, warnings

_COLOURS = 8  # of the page's style; more runs repeat them, with dashes
_OPEN = 6  # charts that are shown unfolded


def render(
  rows: Sequence[Evaluation],
  columns: Sequence[Column],
  everything: Sequence[Evaluation],
  all_columns: Sequence[Column],
) -> str:
  """The page as text. Everything shown is escaped; nothing is loaded from elsewhere.

  Args:
    rows: of the table.
    columns: of these rows.
    everything: the rows and the earlier evaluations of their runs.
    all_columns: of these evaluations.
  """
  runs = list(dict.fromkeys(e.run for e in everything))
  names = labels(rows)
  drawn = [_curves(column, everything, runs) for column in all_columns]
  curves = [chart for chart in drawn if chart]
  several = len({row.run for row in rows}) > 1
  bars = [_bars(column, rows, names, runs) for column in columns] if several else []
  told = warnings(columns, names, report_text.label)
  of_runs = warnings(all_columns, [e.run for e in everything], report_text.label)
  return _template().render(
    title=" and ".join(runs) if len(runs) < 3 else f"{len(runs)} models",
    rows=[
      {"name": name, "step": row.step, "seen": row.examples_seen, "colour": _colour(row.run, runs)}
      for name, row in zip(names, rows, strict=True)
    ],
    columns=columns,
    warnings=told,
    levels=[f"{level:.0%}" for level in sorted({row.level for row in rows})],
    legend=[{"name": run, "colour": _colour(run, runs)} for run in runs],
    curves=curves[:_OPEN],
    more_curves=curves[_OPEN:],
    curve_warnings=[text for text in of_runs if text not in told],
    bars=[bar for bar in bars if bar][:_OPEN],
    more_bars=[bar for bar in bars if bar][_OPEN:],
  )


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  environment.filters.update(
    figure=report_text.figure,
    interval=report_text.interval,
    label=report_text.label,
    parts=lambda name: re.findall(r"[^_/]+[_/]*|[_/]+", name),
    plain=report_text.plain,
  )
  source = Path(__file__).with_name("page_template.html").read_text(encoding="utf-8")
  return environment.from_string(source)


def _colour(run: str, runs: Sequence[str]) -> str:
  """The classes of a run's colour."""
  number = runs.index(run)
  return f"c{number % _COLOURS}" + (" again" if number >= _COLOURS else "")


def _title(column: Column) -> str:
  return report_text.label(column.name) + (f", {column.detail}" if column.detail else "")


def _curves(
  column: Column, everything: Sequence[Evaluation], runs: Sequence[str]
) -> dict[str, Any] | None:
  """A chart over samples seen; None where no run was evaluated twice."""
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
  """One bar for each row with the figure; None where fewer than two have it."""
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


def _percent(share: float) -> float:
  return round(100 * min(max(share, 0.0), 1.0), 2)
