"""Geometry of the report's line charts: metrics in, ticks and SVG paths out. No markup here."""

from collections.abc import Sequence
import dataclasses
import math

WIDTH, HEIGHT = 420, 230  # of the drawing, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 18, 24  # margins around the plot
_MOST_POINTS = 400  # of a drawn line; more are drawn by their extremes


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve: (step, value) in order of steps. A NaN leaves a gap."""

  label: str
  points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Tick:
  """A place on an axis and what stands there."""

  at: float
  label: str


@dataclasses.dataclass(frozen=True)
class Dot:
  """A point that tells its value when pointed at."""

  x: float
  y: float
  label: str


@dataclasses.dataclass(frozen=True)
class Line:
  """One drawn curve."""

  label: str
  path: str  # the smoothed curve, or the curve itself where it is short
  raw: str  # the unsmoothed curve behind it; empty where it is short
  dots: list[Dot]
  few: bool  # few enough points to show each of them
  last: str


@dataclasses.dataclass(frozen=True)
class Chart:
  """Everything a template needs to draw one chart."""

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
  marks: Sequence[tuple[float, str]] = (),
) -> Chart | None:
  """Lays out one chart.

  Args:
    title: shown above.
    series: curves on common axes.
    percent: values are shares, 0 to 1, shown as percentages on an axis that begins at 0.
    marks: (step, text) of vertical lines, such as the beginning of a stage.

  Returns:
    None if no curve has a finite value.
  """
  finite = [p for s in series for p in s.points if math.isfinite(p[1])]
  if not finite:
    return None
  steps = [step for s in series for step, _ in s.points] + [at for at, _ in marks]
  values = [value for _, value in finite]
  low_x, high_x = min(steps), max(steps)
  y_at = nice_ticks(min([*values, 0.0]) if percent else min(values), max(values))
  low_y, high_y = y_at[0], y_at[-1]
  if percent and 0.6 < max(values) <= 1:
    y_at, high_y = [0.0, 0.25, 0.5, 0.75, 1.0], 1.0

  def x(step: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (step - low_x) / ((high_x - low_x) or 1)

  def y(value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low_y) / (high_y - low_y)

  def say(value: float) -> str:
    return f"{value:.1%}" if percent else short(value)

  lines = []
  for one in series:
    points = [p for p in one.points if math.isfinite(p[1])]
    if not points:
      continue
    smooth = smoothed([value for _, value in points], len(points) // 40)
    few = len(points) <= 60
    curve = [(p[0], v) for p, v in zip(points, smooth)]
    shown = [curve[i * (len(curve) - 1) // 39] for i in range(40)] if not few else points
    lines.append(
      Line(
        one.label,
        _path(one.points if few else curve, x, y),
        "" if few else _path(_extremes(one.points), x, y),
        [Dot(x(s), y(v), f"step {s:,.0f}: {say(v)}") for s, v in shown],
        few,
        say(points[-1][1]),
      )
    )
  step_ticks = [s for s in nice_ticks(low_x, high_x, 4) if low_x <= s <= high_x]
  return Chart(
    title,
    lines,
    [Tick(x(s), short(s)) for s in step_ticks],
    [Tick(y(v), f"{v:.3g}" if not percent else f"{100 * v:.3g}%") for v in y_at]
    if percent
    else [Tick(y(v), short(v)) for v in y_at],
    [Tick(x(step), text) for step, text in marks],
  )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
  """About `count` round numbers from at most `low` to at least `high`, evenly spaced."""
  if high - low < 1e-12 * max(abs(low), abs(high)) or high == low:
    pad = abs(low) / 2 or 0.5
    low, high = low - pad, high + pad
  rough = (high - low) / count
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
  """A number in few characters: 0.00123, 3.14, 12.5k, 2M."""
  if not math.isfinite(value):
    return "–"
  if value and abs(value) < 1e-3:
    return f"{value:.2g}".replace("e-0", "e-")
  for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if abs(value) >= limit:
      return f"{value / (1000 if letter == 'k' else limit):.3g}{letter}"
  return f"{value:.4g}"


def smoothed(values: Sequence[float], radius: int) -> list[float]:
  """Mean over `radius` neighbours on either side, fewer at the ends."""
  sums = [0.0]
  for value in values:
    sums.append(sums[-1] + value)
  result = []
  for i in range(len(values)):
    reach = min(radius, i, len(values) - 1 - i)
    result.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
  return result


def _extremes(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """At most _MOST_POINTS points that keep every peak: lowest and highest of each stretch."""
  if len(points) <= _MOST_POINTS:
    return list(points)
  stretches = _MOST_POINTS // 2
  kept = []
  for i in range(stretches):
    part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
    broken = [p for p in part if not math.isfinite(p[1])]
    whole = [p for p in part if math.isfinite(p[1])]
    ends = {min(whole, key=lambda p: p[1]), max(whole, key=lambda p: p[1])} if whole else set()
    kept += sorted([*broken[:1], *ends])
  return kept


def _path(points, x, y) -> str:  # type: ignore[no-untyped-def]
  """SVG path data; a new piece after each gap."""
  commands, pen = [], "M"
  for step, value in points:
    if math.isfinite(value):
      commands.append(f"{pen}{x(step):.1f} {y(value):.1f}")
      pen = "L"
    else:
      pen = "M"
  return "".join(commands)
