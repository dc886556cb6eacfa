"""SVG charts of a recipe: curves of both sides, and their differences."""

from collections.abc import Mapping, Sequence
import functools
from pathlib import Path

import jinja2
import numpy as np

from apps.trainer import charts
from tools.learning import comparison
from tools.learning.trained import Trained

_SMALLEST = 1e-8  # of the logarithmic charts; below one ulp


def render(title: str, ours: Sequence[Trained], torch: Sequence[Trained]) -> str:
  """Return an SVG image with the curves of two trainings per side, and their differences.

  Args:
    title: title of the image.
    ours: trainings of the trainer that differ in summation order.
    torch: the same of PyTorch.
  """
  sides = {"OpenVision": ours, "PyTorch": torch}
  drawn = [
    _curves("Loss", "loss", sides),
    _curves("Gradient norm before clipping", "grad_norm", sides),
    _differences("Largest relative difference of the loss so far, log10", "loss", ours, torch),
    _differences("The same of the gradient norm", "grad_norm", ours, torch),
  ]
  return _template().render(title=title, charts=drawn, width=charts.WIDTH, height=charts.HEIGHT)


def _curves(title: str, curve: str, sides: Mapping[str, Sequence[Trained]]) -> charts.Chart:
  """Return one line per side; the order of PyTorch before ours keeps the thin line on top."""
  series = [
    charts.Series(name, _points(sides[name][0].curves[curve])) for name in ("PyTorch", "OpenVision")
  ]
  return _chart(title, series)


def _differences(
  title: str, curve: str, ours: Sequence[Trained], torch: Sequence[Trained]
) -> charts.Chart:
  groups = {
    "within PyTorch": [(torch[0], torch[1])],
    "within OpenVision": [(ours[0], ours[1])],
    "between them": comparison.across(ours, torch),
  }
  series = []
  for name, pairs in groups.items():
    found = np.maximum(comparison.largest_so_far(pairs, curve), _SMALLEST)
    series.append(charts.Series(name, _points(np.log10(found))))
  return _chart(title, series)


def _chart(title: str, series: Sequence[charts.Series]) -> charts.Chart:
  chart = charts.draw(title, series, smooth=False)
  if chart is None:
    raise ValueError(f"{title}: no value is finite; expected a training without NaN")
  return chart


def _points(values: np.ndarray) -> list[tuple[float, float]]:
  return [(step + 1.0, float(value)) for step, value in enumerate(values)]


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  source = Path(__file__).with_name("figure_template.svg").read_text(encoding="utf-8")
  return environment.from_string(source)
