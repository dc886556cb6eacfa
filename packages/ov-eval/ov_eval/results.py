"""Metric values with count, confidence interval and context, and their JSON file format.

A file holds the metrics of one model at one step, from one or more evaluations:

  split, step, examples_seen, level   see `write_results`
  (any name)                          context of all rows
  results: a list of
    name, value, count, unit          value is null if it is NaN or Inf
    interval                          [low, high] or null
    context                           context of this row; omitted if empty

The context of a row overrides that of the file. Keys are free; these have a fixed meaning:

  split           evaluated data, such as "imagenet2012/validation"
  evaluator       evaluation method, such as "zero_shot"
  templates_hash  hash of the prompts (`prompts_hash`)
  preprocessing   image preprocessing, as text or hash

Metrics of two files are comparable if name, count and these four keys are equal.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

# Errors raised for malformed JSON.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
_HEAD = ("split", "step", "examples_seen", "level")


@dataclasses.dataclass(frozen=True)
class Result:
  """Value of one metric.

  Attributes:
    name: name of the metric, such as `caption_nll`.
    value: value of the metric.
    count: number of examples.
    low, high: confidence interval; None if it is undefined.
    unit: `share` (0 to 1), `nats` (per token), `words`, `rank` (from 1), or empty.
    context: further identification of the evaluation, JSON values by name.
  """

  name: str
  value: float
  count: int
  low: float | None = None
  high: float | None = None
  unit: str = ""
  context: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class ResultFile:
  """Content of a file written by `write_results`.

  Attributes:
    split, step, examples_seen, level: arguments of `write_results`.
    context: context of all rows.
    results: rows; the context of each includes that of the file and `split`.
  """

  split: str
  step: int
  examples_seen: int
  level: float
  context: Mapping[str, Any]
  results: tuple[Result, ...]


def with_context(results: Iterable[Result], **context: Any) -> list[Result]:
  """Return the results with added context; existing keys of a result are kept.

  >>> with_context([Result("knn_top1", 0.5, 10)], evaluator="knn")[0].context
  {'evaluator': 'knn'}
  """
  return [dataclasses.replace(r, context={**context, **r.context}) for r in results]


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
  """Write results atomically to one JSON file.

  Args:
    path: path of the file; an existing file is replaced.
    results: metrics; use `with_context` to distinguish equal names of several evaluations.
    split: name of the evaluated data, such as `heldout`.
    step: training step of the weights.
    examples_seen: number of training examples, counting repeats.
    level: level of the confidence intervals.
    **context: further identification of the evaluation (hash of the prompts, preprocessing), JSON
      values.
  """
  head = {"split": split, "step": step, "examples_seen": examples_seen, "level": level, **context}
  rows: list[dict[str, Any]] = []
  for r in results:
    row = {
      "name": r.name,
      "value": _finite(r.value),
      "count": r.count,
      "unit": r.unit,
      "interval": None if r.low is None else [_finite(r.low), _finite(r.high)],
    }
    own = {name: value for name, value in r.context.items() if head.get(name) != value}
    rows.append({**row, "context": own} if own else row)
  text = json.dumps({**head, "results": rows}, indent=2, allow_nan=False) + "\n"
  target = Path(path)
  partial = target.with_name(target.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, target)


def read_results(path: str | os.PathLike[str]) -> ResultFile:
  """Read a file written by `write_results`; null becomes NaN.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if the file is malformed.
  """
  try:
    head = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = head.pop("results")
    split, step, examples_seen, level = (head.pop(name) for name in _HEAD)
    context = {**head, "split": split}
    results = tuple(_result(row, context) for row in rows)
  except _MALFORMED as error:
    raise ValueError(
      f"{path} is not a results file ({type(error).__name__}: {error}); "
      "expected a file written by `ov_eval.write_results`."
    ) from error
  return ResultFile(split, step, examples_seen, level, head, results)


def _result(row: Mapping[str, Any], context: Mapping[str, Any]) -> Result:
  low, high = row["interval"] or (None, None)
  return Result(
    row["name"],
    _number(row["value"]),
    row["count"],
    low if low is None else _number(low),
    high if high is None else _number(high),
    unit=row["unit"],
    context={**context, **row.get("context", {})},
  )


def _finite(value: float | None) -> float | None:
  return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> float:
  if value is None:
    return math.nan
  if type(value) not in (int, float):
    raise TypeError(f"{value!r} is not a number")
  return float(value)
