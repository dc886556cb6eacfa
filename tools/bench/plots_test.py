from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tools.bench import plots, results
from tools.bench.harness import Benchmark, Case, Plot, Ratio

SVG = "{http://www.w3.org/2000/svg}"


def _benchmark(values: dict[str, list[float]], plot: Plot) -> dict[str, Any]:
  cases = [Case(name, dict) for name in values]
  toy = Benchmark("toy", "A toy.", cases, plots=[plot])
  measured = {name: {"images_per_s": of} for name, of in values.items()}
  (benchmark,) = results.to_dict([(toy, measured, 3)], "bench")["benchmarks"]
  return benchmark


def _drawn(benchmark: dict[str, Any]) -> ElementTree.Element:
  return ElementTree.fromstring(plots.draw(benchmark, benchmark["plots"][0]))


def _texts(svg: ElementTree.Element) -> list[str]:
  return [text.text or "" for text in svg.iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def two_lines() -> dict[str, Any]:
  values = {"a/1": [10.0, 12, 8], "a/2": [20.0, 21, 19], "b/2": [40.0, 40, 40], "a/4": [30.0] * 3}
  lines = {"a & <b>": [(1, "a/1"), (2, "a/2"), (4, "a/4")], "b": [(2, "b/2")]}
  return _benchmark(values, Plot("Images/s by size", "size", "images_per_s", lines))


def test_points_stand_where_the_figures_are(two_lines: dict[str, Any]):
  svg = _drawn(two_lines)
  first, _ = svg.iter(f"{SVG}g")
  dots = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in first.iter(f"{SVG}circle")][:3]
  (x1, y1), (x2, y2), (x4, y4) = dots
  # Coordinates are written with one decimal.
  np.testing.assert_allclose((x4 - x2) / (x2 - x1), 2, rtol=1e-2)
  np.testing.assert_allclose(y2 - y1, y4 - y2, atol=0.2)
  zero = plots.HEIGHT - plots.BOTTOM  # the axis begins at 0, so heights are in proportion
  np.testing.assert_allclose((zero - y4) / (zero - y1), 3, rtol=1e-2)
  bar = first.find(f"{SVG}line")
  assert bar is not None
  spread = [(zero - float(bar.get(end, 0))) / (zero - y1) for end in ("y1", "y2")]
  np.testing.assert_allclose(spread, [0.8, 1.2], rtol=1e-2)


def test_what_is_written(two_lines: dict[str, Any]):
  texts = _texts(_drawn(two_lines))
  for text in ("Images/s by size", "size", "images/s", "a & <b>", "b", "1", "2", "4", "0"):
    assert text in texts
  assert plots.file_name(two_lines, two_lines["plots"][0]) == "toy-images-s-by-size.svg"


def test_a_wide_span_is_logarithmic_and_says_so():
  values = {str(x): [1.0] * 3 for x in (1, 10, 100)}
  lines = {"": [(x, str(x)) for x in (1, 10, 100)]}
  svg = _drawn(_benchmark(values, Plot("t", "rows", "images_per_s", lines)))
  a, b, c = (float(dot.get("cx", 0)) for dot in svg.iter(f"{SVG}circle"))
  np.testing.assert_allclose(c - b, b - a, atol=0.2)
  assert "rows, logarithmic" in _texts(svg)


def test_numbers_below_the_axis_do_not_touch():
  xs = [*range(0, 3000, 100), 2990]
  values = {str(x): [1.0] * 3 for x in xs}
  lines = {"": [(x, str(x)) for x in xs]}
  svg = _drawn(_benchmark(values, Plot("t", "rows", "images_per_s", lines)))
  below = [t for t in svg.iter(f"{SVG}text") if t.get("text-anchor") == "middle"][:-2]
  at = [float(text.get("x", 0)) for text in below]
  assert at == sorted(at) and min(np.diff(at)) > 30 and len(at) > 8
  assert below[0].text == "0" and below[-1].text == "2,990"


def test_one_point_and_ratios():
  toy = Benchmark(
    "toy", "A toy.", [Case("a", dict), Case("b", dict)], [Ratio("a", "b")],
    plots=[Plot("t", "x", "cpu_s", {"": [(3, "a : b")]})],
  )  # fmt: skip
  measured = {name: {"cpu_s": [2.0]} for name in ("a", "b", "a : b")}
  (benchmark,) = results.to_dict([(toy, measured, 1)], "bench")["benchmarks"]
  svg = _drawn(benchmark)
  assert "CPU s, ratio" in _texts(svg) and len(list(svg.iter(f"{SVG}circle"))) == 1
