"""A figure together with what it needs to be trusted, and the file it is written to.

One file holds the figures of one model at one step, of one evaluation or several:

  split, step, examples_seen, level   as in `write_results`
  (any name)                          context of every row
  results: a list of
    name, value, count, unit          value is null where it is not finite
    interval                          [low, high] or null
    context                           what is different for this row; left out where nothing is

A row's context wins over the file's. Its names are free; these have a meaning everywhere:

  split           the evaluated data, such as "imagenet2012/validation"
  evaluator       how it was evaluated, such as "zero_shot"
  templates_hash  of the prompts (`prompts_hash`)
  preprocessing   of the pictures, in words or as a hash

Figures of two files compare where name, count and these four are equal.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

# Errors of JSON of another form.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_HEAD = ("split", "step", "examples_seen", "level")


@dataclasses.dataclass(frozen=True)
class Result:
  """One figure.

  Attributes:
    name: flat, such as `caption_nll`.
    value: the figure.
    count: examples behind it.
    low, high: confidence interval; None where none is defined.
    unit: `share` (0 to 1), `nats` (per token), `words`, or empty.
    context: what else identifies it, JSON values by name.
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
  """What `write_results` wrote.

  Attributes:
    split, step, examples_seen, level: as it took them.
    context: of every row.
    results: the rows; the context of each is complete: the file's, `split`, and its own.
  """

  split: str
  step: int
  examples_seen: int
  level: float
  context: Mapping[str, Any]
  results: tuple[Result, ...]


def with_context(results: Iterable[Result], **context: Any) -> list[Result]:
  """The results, each with this context; what a result says already stays.

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
  """Writes results as one JSON file, whole or not at all.

  Args:
    path: file to (over)write.
    results: the figures; equal names of several evaluations are told apart by `with_context`.
    split: name of the evaluated data, such as `heldout`.
    step: training step of the weights.
    examples_seen: training examples behind the weights, repeats counted.
    level: of the confidence intervals.
    **context: what else identifies the evaluation (prompts' hash, preprocessing); JSON values.
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
  """Reads what `write_results` wrote; null becomes NaN.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if it is not such a file, with its path.
  """
  try:
    head = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = head.pop("results")
    split, step, examples_seen, level = (head.pop(name) for name in _HEAD)
    context = {**head, "split": split}
    results = tuple(_result(row, context) for row in rows)
  except (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
  ) as error:
    raise ValueError(
      f"{path} is no file of results ({type(error).__name__}: {error}); "
      "expected one that `ov_eval.write_results` made."
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
