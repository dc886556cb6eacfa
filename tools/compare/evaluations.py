"""Read files of metrics, and align the metrics of several models in columns."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
import re
from typing import Annotated, Any

import msgspec

import ov_eval
from ov_eval import Result

# Fields that must be equal in comparable metrics, in addition to the number of examples.
CONTEXT = ("evaluator", "split", "templates_hash", "preprocessing")
# Sets of fields; the smallest set that distinguishes equal names within a file is used.
_KEYS = ((), ("evaluator",), ("split",), ("templates_hash",), ("evaluator", "split"), CONTEXT)

_LOWER_IS_BETTER = re.compile(r"nll|perplexity|loss|rank|error")
_NEITHER_IS_BETTER = re.compile(r"^majority_|^distinct_|_words$|_l2$")


_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
_LARGEST = 1e30  # larger than every real metric, and within the limits of chart axes
_Figure = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]


@dataclasses.dataclass(frozen=True)
class _Row:
  """The types of a metric in a file."""

  name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
  value: float  # NaN if the file has null
  count: _Count
  low: _Figure | None
  high: _Figure | None
  unit: Annotated[str, msgspec.Meta(max_length=40)]
  context: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _File:
  """The types of a file of metrics."""

  split: Annotated[str, msgspec.Meta(max_length=1000)]
  step: _Count
  examples_seen: _Count
  level: Annotated[float, msgspec.Meta(gt=0, lt=1)]
  results: list[_Row]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The metrics of one model at one step.

  Attributes:
    run: unique name of the run.
    step, examples_seen, level: as `ov_eval.write_results` took them.
    results: the metrics.
  """

  run: str
  step: int
  examples_seen: int
  level: float
  results: tuple[Result, ...]


@dataclasses.dataclass(frozen=True)
class Runs:
  """All evaluations that were read.

  Attributes:
    rows: the rows of the table: the last evaluation of each run, or every evaluation if there is
      only one run, and each file argument.
    all: the rows and the earlier evaluations of the runs, ordered by run and step.
  """

  rows: tuple[Evaluation, ...]
  all: tuple[Evaluation, ...]


@dataclasses.dataclass(frozen=True)
class Difference:
  """The reason why the metrics of a column are not comparable: rows differ in `what`."""

  what: str
  values: Mapping[str, tuple[int, ...]]  # value -> rows


@dataclasses.dataclass(frozen=True)
class Column:
  """One metric of several evaluations.

  Attributes:
    name: name of the metric.
    detail: distinguishes the metric from others of that name, such as by the split; often empty.
    results: one for each row, or None for a row without the metric.
    differences: reasons why the rows are not comparable; empty if they are.
    best: rows with the best value; empty if rows are not comparable or no value is better.
  """

  name: str
  detail: str
  results: tuple[Result | None, ...]
  differences: tuple[Difference, ...]
  best: frozenset[int]


def read(paths: Sequence[str]) -> Runs:
  """Read files of metrics and workdirs of runs.

  Args:
    paths: files written by `ov_eval.write_results`, or workdirs with `evaluation.json` and
      optionally `evaluations/<step>.json`.

  Raises:
    ValueError, OSError: if a file is missing or invalid; the message has its path.
  """
  files: dict[Path, Path] = {}  # file -> path that names its run
  last: dict[Path, Path] = {}  # workdir -> last evaluation
  named: list[Path] = []
  for text in paths:
    path = Path(text).expanduser()
    if not path.exists():
      raise ValueError(f"{text}: no such file or folder.")
    path = path.resolve()
    found = _evaluations(path) if path.is_dir() else [path]
    for file in found:
      files.setdefault(file, _run_of(file))
    if path.is_dir():
      last[path] = found[-1]
    named.append(found[-1])
  names = _short_names(list(dict.fromkeys(files.values())))
  read_files = {file: _read(file, names[run]) for file, run in files.items()}
  in_order = {run: number for number, run in enumerate(names.values())}
  everything = sorted(read_files.values(), key=lambda e: (in_order[e.run], e.step))
  if len(names) == 1 and last:
    return Runs(tuple(everything), tuple(everything))
  return Runs(tuple(read_files[file] for file in dict.fromkeys(named)), tuple(everything))


def columns(
  evaluations: Sequence[Evaluation], pattern: str = "", first: Sequence[str] = ()
) -> list[Column]:
  """Align equal metrics in columns.

  Args:
    evaluations: the rows.
    pattern: regular expression that is searched for in the names of metrics.
    first: names of the first columns. The others follow in the order of the files.

  Raises:
    ValueError: if the pattern is invalid or matches no name, or a file has a metric twice.
  """
  try:
    wanted = re.compile(pattern)
  except re.error as error:
    raise ValueError(f"--metrics={pattern} is not a regular expression: {error}.") from error
  names = list(dict.fromkeys(r.name for e in evaluations for r in e.results))
  shown = [name for name in names if wanted.search(name)]
  if not shown:
    raise ValueError(f"--metrics={pattern} matches none of {', '.join(names)}.")
  shown.sort(key=lambda name: [*first, name].index(name))
  found = []
  for name in shown:
    key = _key(name, evaluations)
    cells: dict[tuple[Any, ...], list[Result | None]] = {}
    for row, evaluation in enumerate(evaluations):
      for result in evaluation.results:
        if result.name == name:
          place = tuple(result.context.get(field) for field in key)
          cells.setdefault(place, [None] * len(evaluations))[row] = result
    for place, results in cells.items():
      detail = ", ".join(str(value) for value in place if value is not None)
      found.append(_column(name, detail, results))
  return found


def direction(result: Result) -> int:
  """Return 1 if higher is better, -1 if lower is better, otherwise 0."""
  if _NEITHER_IS_BETTER.search(result.name):
    return 0
  return -1 if _LOWER_IS_BETTER.search(result.name) else 1


def warnings(
  found: Sequence[Column], rows: Sequence[str], say: Callable[[str], str] = str
) -> list[str]:
  """Return one line for each property that differs between rows, with the metrics it affects.

  Args:
    found: columns of metrics.
    rows: names of the rows; a name that repeats is reported once.
    say: formats the name of a metric.
  """
  names: dict[tuple[str, str], list[str]] = {}
  for column in found:
    for difference in column.differences:
      values = " against ".join(
        f"{value} ({', '.join(dict.fromkeys(rows[row] for row in places))})"
        for value, places in difference.values.items()
      )
      names.setdefault((difference.what, values), []).append(say(column.name))
  return [
    f"{what} of {', '.join(dict.fromkeys(concerned))}: {values}"
    for (what, values), concerned in names.items()
  ]


def labels(evaluations: Sequence[Evaluation]) -> list[str]:
  """Return a name for each row: the run, and its step if the run has several rows."""
  runs = [evaluation.run for evaluation in evaluations]
  return [e.run if runs.count(e.run) == 1 else f"{e.run} @ {e.step:,}" for e in evaluations]


def _evaluations(workdir: Path) -> list[Path]:
  """Return the evaluation files of a workdir in order of step; `evaluation.json` is last."""
  steps = [
    path
    for path in workdir.glob("evaluations/*.json")
    if path.stem.isascii() and path.stem.isdecimal()
  ]
  found = sorted(steps, key=lambda path: int(path.stem))
  newest = workdir / "evaluation.json"
  if newest.is_file():
    # The same metrics are also stored under their step.
    same = newest.read_bytes()
    found = [path for path in found if path.read_bytes() != same] + [newest]
  if not found:
    raise ValueError(
      f"{workdir} has no evaluation.json; give the workdir of a run that was evaluated, or a file."
    )
  return found


def _run_of(file: Path) -> Path:
  """Return the workdir that contains a file, or the file itself if there is none."""
  if file.name == "evaluation.json":
    return file.parent
  return file.parent.parent if file.parent.name == "evaluations" else file


def _short_names(runs: Sequence[Path]) -> dict[Path, str]:
  """Return the shortest suffix of each path that distinguishes it from the others."""
  names = {}
  for run in runs:
    others = [other.parts for other in runs if other != run]
    size = 1
    while size < len(run.parts) and any(o[-size:] == run.parts[-size:] for o in others):
      size += 1
    names[run] = "/".join(run.parts[-size:]) or str(run)
  return names


def _read(file: Path, run: str) -> Evaluation:
  try:
    found = ov_eval.read_results(file)
    msgspec.convert(dataclasses.asdict(found), type=_File)
  except (OverflowError, RecursionError, msgspec.ValidationError) as error:
    raise ValueError(f"{file} is not a results file: {' '.join(str(error).split())}") from error
  if not found.results:
    raise ValueError(f"{file} contains no metric; evaluate the model first.")
  for result in found.results:
    if math.isfinite(result.value) and abs(result.value) > _LARGEST:
      raise ValueError(f"{file}: {result.name} is {result.value:g}; expected at most {_LARGEST:g}")
    shown = (result.name, result.unit, *(result.context.get(what) for what in CONTEXT))
    for value in shown:
      if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise ValueError(
          f"{file}: the result {result.name[:80]!r} has {str(value)[:80]!r}; expected a string of "
          "one line as name, unit and context"
        )
  return Evaluation(run, found.step, found.examples_seen, found.level, found.results)


def _key(name: str, evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
  for key in _KEYS:
    if all(_distinct(name, key, evaluation) for evaluation in evaluations):
      return key
  twice = next(e for e in evaluations if not _distinct(name, CONTEXT, e))
  raise ValueError(
    f"{twice.run} contains {name} twice with the same {', '.join(CONTEXT)}; "
    "distinguish them with ov_eval.with_context."
  )


def _distinct(name: str, key: Sequence[str], evaluation: Evaluation) -> bool:
  places = [
    json.dumps([r.context.get(field) for field in key])
    for r in evaluation.results
    if r.name == name
  ]
  return len(set(places)) == len(places)


def _column(name: str, detail: str, results: Sequence[Result | None]) -> Column:
  present = {row: result for row, result in enumerate(results) if result is not None}
  differences = []
  for what in (*CONTEXT, "count"):
    values: dict[str, tuple[int, ...]] = {}
    for row, result in present.items():
      value = f"{result.count:,}" if what == "count" else result.context.get(what, "not given")
      values[str(value)] = (*values.get(str(value), ()), row)
    if len(values) > 1:
      differences.append(Difference("number of examples" if what == "count" else what, values))
  scores = {
    row: direction(result) * result.value
    for row, result in present.items()
    if math.isfinite(result.value)
  }
  best = {row for row, score in scores.items() if score == max(scores.values())}
  if differences or len(best) == len(scores):
    best = set()
  return Column(name, detail, tuple(results), tuple(differences), frozenset(best))
