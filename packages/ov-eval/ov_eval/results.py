"""A figure together with what it needs to be trusted, and the file it is written to."""

from collections.abc import Iterable
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
  """One figure.

  Attributes:
    name: flat, such as `caption_nll`.
    value: the figure.
    count: examples behind it.
    low, high: confidence interval; None where none is defined.
    unit: `share` (0 to 1), `nats` (per token), `words`, or empty.
  """

  name: str
  value: float
  count: int
  low: float | None = None
  high: float | None = None
  unit: str = ""


def write_results(
  path: str | os.PathLike[str],
  results: Iterable[Result],
  *,
  split: str,
  step: int,
  examples_seen: int,
  level: float = 0.95,
  **context: Any,
) -> None:
  """Writes results as one JSON file, whole or not at all.

  Args:
    path: file to (over)write.
    results: the figures.
    split: name of the evaluated data, such as `heldout`.
    step: training step of the weights.
    examples_seen: training examples behind the weights, repeats counted.
    level: of the confidence intervals.
    **context: what else identifies the evaluation (prompts' hash, preprocessing); JSON values.
  """
  rows = [
    {
      "name": r.name,
      "value": _finite(r.value),
      "count": r.count,
      "unit": r.unit,
      "interval": None if r.low is None else [_finite(r.low), _finite(r.high)],
    }
    for r in results
  ]
  head = {"split": split, "step": step, "examples_seen": examples_seen, "level": level}
  text = json.dumps({**head, **context, "results": rows}, indent=2, allow_nan=False) + "\n"
  target = Path(path)
  partial = target.with_name(target.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, target)


def _finite(value: float | None) -> float | None:
  return value if value is not None and math.isfinite(value) else None
