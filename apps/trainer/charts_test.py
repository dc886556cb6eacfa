import math
import re

import numpy as np
import pytest

from apps.trainer.charts import (
  BOTTOM,
  HEIGHT,
  LEFT,
  RIGHT,
  TOP,
  WIDTH,
  Series,
  draw,
  nice_ticks,
  running_mean,
  short,
)


@pytest.mark.parametrize(
  "low, high, expected",
  [
    (0.1, 3.3, [0, 1, 2, 3, 4]),
    (0, 1e-3, [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3]),
    (190, 532, [100, 200, 300, 400, 500, 600]),
    (-2, 2, [-2, -1, 0, 1, 2]),
  ],
)
def test_ticks_are_round(low, high, expected):
  np.testing.assert_allclose(nice_ticks(low, high), expected, atol=1e-12)


@pytest.mark.parametrize("low, high", [(0, 0), (5, 5), (-3, -3), (1e-9, 1e-9), (1e12, 3e12)])
def test_ticks_enclose_constant(low, high):
  ticks = nice_ticks(low, high)
  assert ticks[0] <= low and ticks[-1] >= high and ticks[0] < ticks[-1] and len(ticks) <= 8


@pytest.mark.parametrize(
  "value, text",
  [
    (0, "0"), (7.5e-4, "7.5e-4"), (0.0312345, "0.03123"), (math.pi, "3.142"), (4800, "4,800"),
    (12_500, "12.5k"), (2e6, "2M"), (3.4e9, "3.4G"), (-0.5, "-0.5"), (math.nan, "–"),
  ],
)  # fmt: skip
def test_short(value, text):
  assert short(value) == text


def test_running_mean_keeps_length_and_constants():
  assert running_mean([2.0] * 9, 3) == [2.0] * 9
  values = np.random.default_rng(0).random(50)
  mean = running_mean(values.tolist(), 4)
  np.testing.assert_allclose(mean[20], values[16:25].mean())
  np.testing.assert_allclose(mean[-1], values[-5:].mean())


def _coordinates(path):
  return np.array(re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path), float)


def test_points_are_inside_frame():
  steps = range(10, 5000, 10)
  noise = np.random.default_rng(1).normal(size=len(steps))
  chart = draw("loss", [Series("", [(s, 3 / s + 0.1 * n) for s, n in zip(steps, noise)])])
  (line,) = chart.lines
  for path in (line.path, line.raw):
    xy = _coordinates(path)
    assert (xy[:, 0] >= LEFT - 0.1).all() and (xy[:, 0] <= WIDTH - RIGHT + 0.1).all()
    assert (xy[:, 1] >= TOP - 0.1).all() and (xy[:, 1] <= HEIGHT - BOTTOM + 0.1).all()
  assert all(LEFT <= tick.at <= WIDTH - RIGHT for tick in chart.x_ticks)


def test_thinning_keeps_single_spike():
  points = [(float(s), 0.0) for s in range(100_000)]
  points[54_321] = (54_321.0, 9.0)
  (line,) = draw("loss", [Series("", points)]).lines
  assert len(line.raw) + len(line.path) < 20_000
  chart = draw("loss", [Series("", points)], smooth=False)
  assert _coordinates(chart.lines[0].path)[:, 1].min() < HEIGHT / 4


def test_gaps_start_new_subpath():
  (line,) = draw("x", [Series("", [(1, 1.0), (2, math.nan), (3, 2.0)])]).lines
  assert line.path.count("M") == 2 and len(line.dots) == 2


def test_no_chart_without_finite_values():
  assert draw("x", [Series("", [(1, math.nan)])]) is None and draw("x", []) is None


def test_one_empty_curve():
  chart = draw("x", [Series("a", [(1, math.nan)]), Series("b", [(1, 2.0)])])
  assert [line.last for line in chart.lines] == ["–", "2"]


def test_percent_axis_starts_at_zero():
  chart = draw("accuracy", [Series("", [(1, 0.7), (2, 0.93)])], percent=True)
  assert [tick.label for tick in chart.y_ticks] == ["0%", "25%", "50%", "75%", "100%"]
  assert chart.lines[0].last == "93.0%"


def test_running_mean_restarts_at_stages():
  points = [(s, 1.0 if s < 500 else 0.0) for s in range(1000)]
  (line,) = draw("speed", [Series("", points)], marks=[(0, "a"), (500, "b")]).lines
  y = set(_coordinates(line.path)[:, 1])
  assert len(y) == 2
