"""Geometry of the line charts in the report: computes ticks and SVG paths, without markup.

The report and tools/compare share it. A plotting library would be a dependency of every training
run for this one kind of chart.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import math

WIDTH, HEIGHT = 420, 230  # size of the chart in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 18, 24  # margins around the plot
_MAX_POINTS = 400  # points per line; longer series keep only local extremes
_FEW = 40  # series with up to this many points show each point


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve: (step, value) pairs in order of steps. NaN leaves a gap."""

  label: str
  points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Tick:
  """A position on an axis and its label."""

  at: float
  label: str


@dataclasses.dataclass(frozen=True)
class Dot:
  """A data point with a tooltip."""

  x: float
  y: float
  label: str


@dataclasses.dataclass(frozen=True)
class Line:
  """One drawn curve."""

  label: str
  path: str  # SVG path of the running mean, or of the values themselves
  raw: str  # SVG path of the unsmoothed values if `path` is a running mean, else empty
  dots: list[Dot]
  few: bool  # whether each point is drawn as a dot
  last: str  # the last value of `path`


@dataclasses.dataclass(frozen=True)
class Chart:
  """Everything that the template needs to draw one chart."""

  title: str
  lines: list[Line]
  x_ticks: list[Tick]
  y_ticks: list[Tick]
  marks: list[Tick]
  width: int = WIDTH
  height: int = HEIGHT
  left: int = LEFT
  right: int = WIDTH - RIGHT
  top: int = TOP
  bottom: int = HEIGHT - BOTTOM


def draw(
  title: str,
  series: Sequence[Series],
  *,
  percent: bool = False,
  smooth: bool = True,
  marks: Sequence[tuple[float, str]] = (),
  x_name: str = "step",
) -> Chart | None:
  """Lay out one chart.

  Args:
    title: title above the chart.
    series: curves on common axes.
    percent: values are fractions from 0 to 1, shown as percentages on an axis that starts at 0.
    smooth: draw a running mean of long curves.
    marks: (step, text) of vertical lines, such as starts of stages; the running mean restarts at
      each of them.
    x_name: name of the x axis in the tooltips.

  Returns:
    None if no curve has a finite value.
  """
  finite = [p for s in series for p in s.points if math.isfinite(p[1])]
  if not finite:
    return None
  steps = [step for step, _ in finite] + [step for step, _ in marks]
  values = [value for _, value in finite]
  first = 0 if min(steps) < 0.1 * max(steps) else min(steps)
  x_axis = _Axis(first, max(steps), LEFT, WIDTH - RIGHT)
  y_at = nice_ticks(min([*values, 0.0]) if percent else min(values), max(values))
  if percent and 0.6 < max(values) <= 1 and min(values) >= 0:
    y_at = [0.0, 0.25, 0.5, 0.75, 1.0]
  y_axis = _Axis(y_at[0], y_at[-1], HEIGHT - BOTTOM, TOP)
  format_value = _percent if percent else short
  return Chart(
    title,
    [
      _line(one, x_axis, y_axis, format_value, smooth, [s for s, _ in marks], x_name)
      for one in series
    ],
    [Tick(x_axis(s), short(s)) for s in nice_ticks(first, max(steps)) if first <= s <= max(steps)],
    [Tick(y_axis(v), f"{100 * v:.3g}%" if percent else short(v)) for v in y_at],
    [Tick(x_axis(step), text) for step, text in marks],
  )


class _Axis:
  """Map [low, high] to drawing coordinates."""

  def __init__(self, low: float, high: float, start: float, end: float):
    self.range = low, high
    self._start, self._scale = start, (end - start) / ((high - low) or 1)

  def __call__(self, value: float) -> float:
    return self._start + (value - self.range[0]) * self._scale


def _line(
  series: Series,
  x_axis: _Axis,
  y_axis: _Axis,
  format_value: Callable[[float], str],
  smooth: bool,
  breaks: Sequence[float],
  x_name: str,
) -> Line:
  points = [p for p in series.points if math.isfinite(p[1])]
  few = len(points) <= _FEW
  radius = 0 if few or not smooth else len(points) // 40
  curve: list[tuple[float, float]] = []
  for start, end in itertools.pairwise([-math.inf, *breaks, math.inf]):
    part = [p for p in points if start <= p[0] < end]
    mean = running_mean([value for _, value in part], radius)
    curve += [(step, value) for (step, _), value in zip(part, mean)]
  shown = curve if few else [curve[i * (len(curve) - 1) // (_FEW - 1)] for i in range(_FEW)]
  return Line(
    series.label,
    _path(_extremes(curve if radius else series.points), x_axis, y_axis),
    _path(_extremes(series.points), x_axis, y_axis) if radius else "",
    [Dot(x_axis(step), y_axis(v), f"{x_name} {step:,.0f}: {format_value(v)}") for step, v in shown],
    few,
    format_value(curve[-1][1]) if curve else "–",
  )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Return about `count` evenly spaced round numbers that cover [low, high]."""
  if high - low < 1e-12 * max(abs(low), abs(high)) or high == low:
    pad = abs(low) / 2 or 0.5
    low, high = low - pad, high + pad
  rough = (high - low) / count
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
  """Format a number in few characters: 7.5e-4, 0.0312, 3.142, 4,800, 12.5k, 2M."""
  if not math.isfinite(value):
    return "–"
  if value and abs(value) < 0.01:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= max(unit, 1e4):
      return f"{value / unit:.3g}{letter}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def running_mean(values: Sequence[float], radius: int) -> list[float]:
  """Return the mean over up to `radius` neighbours on each side.

  Near the start, where a loss falls steeply, the window extends no further ahead than back, except
  for a quarter of the radius.
  """
  sums = list(itertools.accumulate(values, initial=0.0))
  means = []
  for i in range(len(values)):
    start = max(0, i - radius)
    end = min(len(values), i + min(radius, max(i, radius // 4)) + 1)
    means.append((sums[end] - sums[start]) / (end - start))
  return means


def _percent(value: float) -> str:
  return f"{value:.1%}"


def _extremes(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Return at most _MAX_POINTS points: the lowest and the highest of each interval."""
  if len(points) <= _MAX_POINTS:
    return list(points)
  stretches = _MAX_POINTS // 2
  kept = []
  for i in range(stretches):
    part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
    broken = [p for p in part if not math.isfinite(p[1])]
    whole = [p for p in part if math.isfinite(p[1])]
    ends = {min(whole, key=lambda p: p[1]), max(whole, key=lambda p: p[1])} if whole else set()
    kept += sorted([*broken[:1], *ends])
  return kept


def _path(points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
  """Return SVG path data with a new subpath after each gap."""
  commands, pen = [], "M"
  for step, value in points:
    if math.isfinite(value):
      commands.append(f"{pen}{x_axis(step):.1f} {y_axis(value):.1f}")
      pen = "L"
    else:
      pen = "M"
  return "".join(commands)
