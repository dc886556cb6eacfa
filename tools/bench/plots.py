"""Plots of a file of `results` as plain SVG: curves of one metric, each point with its spread.

The ground is white, so that they can be read on a page of any colour. The axis upwards begins at
0. Numbers across that span much are spaced by their logarithm, and the axis says so.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import re
from typing import Any
from xml.etree import ElementTree

from apps.trainer import charts
from tools.bench.harness import METRICS

WIDTH, HEIGHT = 560, 330  # of the frame, in SVG units, with the margins but without the legend
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 44, 54
LOGARITHM = 30  # from this ratio of the largest to the smallest number across on
_CHARACTER = 7.0  # at most this wide, at the size of the legend
_TICK_GAP = 34  # least distance of two numbers below the axis
# Told apart with any kind of colour vision, on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8488a", "#8a6d00", "#4a4a4a")
_DASHES = ("", "6 4", "2 3")  # once all colours are used
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333; }
.title { font-size: 15px; font-weight: 600; fill: #111; }
.grid { stroke: #e2e2e2; }
.axis { stroke: #777; }
"""


def file_name(benchmark: dict[str, Any], plot: dict[str, Any]) -> str:
  """Of the drawing: the name of the benchmark and the words of the title."""
  slug = re.sub(r"[^a-z0-9]+", "-", plot["title"].lower()).strip("-")
  return f"{benchmark['name']}-{slug}.svg"


def draw(benchmark: dict[str, Any], plot: dict[str, Any]) -> str:
  """One of a benchmark's plots as the text of an SVG file."""
  rows = {row["name"]: row for row in benchmark["rows"]}
  lines = {
    label: [_Point(x, **_range(rows[row]["metrics"][plot["metric"]])) for x, row in points]
    for label, points in plot["lines"].items()
  }
  xs = sorted({point.x for points in lines.values() for point in points})
  highest = max(point.high for points in lines.values() for point in points)
  labels = [label for label in lines if label]
  legend = 34 + _CHARACTER * max(map(len, labels)) if labels else 0

  x_axis, x_ticks, logarithmic = _across(xs)
  y_ticks = charts.nice_ticks(0, highest)
  y_axis = _axis(0, y_ticks[-1], HEIGHT - BOTTOM, TOP)

  heading = METRICS[plot["metric"]].heading
  if all(rows[row]["ratio"] for points in plot["lines"].values() for _, row in points):
    heading = f"{heading}, ratio"
  width = round(WIDTH + legend)
  svg = ElementTree.Element(
    "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {HEIGHT}", role="img"
  )
  svg.attrib |= {"width": str(width), "height": str(HEIGHT), "aria-label": plot["title"]}
  _add(svg, "style").text = _STYLE
  _add(svg, "rect", width=width, height=HEIGHT, fill="#fff")
  _text(svg, plot["title"], LEFT, 24, "start", kind="title")
  for y in y_ticks:
    _line(svg, LEFT, y_axis(y), WIDTH - RIGHT, y_axis(y), kind="grid")
    _text(svg, charts.short(y), LEFT - 8, y_axis(y) + 4, "end")
  bottom = y_axis(0)
  _line(svg, LEFT, bottom, WIDTH - RIGHT, bottom, kind="axis")
  for x in x_ticks:
    _line(svg, x_axis(x), bottom, x_axis(x), bottom + 4, kind="axis")
    _text(svg, charts.short(x), x_axis(x), bottom + 18, "middle")
  middle = (LEFT + WIDTH - RIGHT) / 2
  across = f"{plot['x_label']}, logarithmic" if logarithmic else plot["x_label"]
  _text(svg, across, middle, HEIGHT - 12, "middle")
  upwards = _text(svg, heading, 18, (TOP + bottom) / 2, "middle")
  upwards.set("transform", f"rotate(-90 18 {(TOP + bottom) / 2:.1f})")

  for number, (label, points) in enumerate(lines.items()):
    colour = _COLOURS[number % len(_COLOURS)]
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    group = _add(svg, "g", stroke=colour, fill=colour)
    ends = [(x_axis(point.x), y_axis(point.median)) for point in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
    curve = {"fill": "none", "stroke-width": 2, "stroke-dasharray": dashes or "none"}
    _add(group, "path", d=path, **curve)
    for point, (x, y) in zip(points, ends, strict=True):
      _line(group, x, y_axis(point.low), x, y_axis(point.high))
      _add(group, "circle", cx=x, cy=y, r=3.2)
    if label:
      y = TOP + 8 + 20 * number
      _add(group, "path", d=f"M{WIDTH} {y}h22", **curve)
      _add(group, "circle", cx=WIDTH + 11, cy=y, r=3.2)
      _text(svg, label, WIDTH + 28, y + 4, "start")
  ElementTree.indent(svg)
  return ElementTree.tostring(svg, encoding="unicode") + "\n"


@dataclasses.dataclass(frozen=True)
class _Point:
  x: float
  median: float
  low: float
  high: float


def _range(figure: dict[str, Any]) -> dict[str, float]:
  return {name: figure[name] for name in ("median", "low", "high")}


def _across(xs: Sequence[float]) -> tuple[Callable[[float], float], list[float], bool]:
  """The axis, the numbers that stand below it, whether it is logarithmic.

  The numbers are the points' own, but for those too near to the one before and to the last.
  """
  logarithmic = xs[0] > 0 and xs[-1] > LOGARITHM * xs[0]
  scale = math.log if logarithmic else float
  low, high = scale(xs[0]), scale(xs[-1])
  pad = 0.04 * (high - low) or 1.0
  place = _axis(low - pad, high + pad, LEFT, WIDTH - RIGHT)
  axis = lambda x: place(scale(x))
  ticks = [xs[0]]
  for x in xs[1:-1]:
    if axis(x) - axis(ticks[-1]) >= _TICK_GAP <= axis(xs[-1]) - axis(x):
      ticks.append(x)
  return axis, ticks + list(xs[1:][-1:]), logarithmic


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
  """Maps [low, high] to the drawing."""
  return lambda value: start + (value - low) * (end - start) / (high - low)


def _add(parent: ElementTree.Element, tag: str, **attributes: Any) -> ElementTree.Element:
  written = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
  return ElementTree.SubElement(parent, tag, written)


def _line(
  parent: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, kind: str = ""
) -> None:
  classes = {"class": kind} if kind else {}
  _add(parent, "line", x1=x1, y1=y1, x2=x2, y2=y2, **classes)


def _text(
  parent: ElementTree.Element, text: str, x: float, y: float, anchor: str, kind: str = ""
) -> ElementTree.Element:
  options = {"text-anchor": anchor} | ({"class": kind} if kind else {})
  element = _add(parent, "text", x=x, y=y, **options)
  element.text = text
  return element
