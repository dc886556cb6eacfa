"""Tests of reading metrics, of columns, and of the conditions for a comparison."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import ov_eval
from ov_eval import Result
from tools.compare import text_table
from tools.compare.evaluations import columns, direction, labels, read, warnings

CONTEXT = {
  "evaluator": "zero_shot",
  "split": "pets/test",
  "templates_hash": "ab12",
  "preprocessing": "squash",
}


def _top1(value: float = 0.5, count: int = 100, **context: Any) -> Result:
  low, high = value - 0.1, value + 0.1
  return Result("zero_shot_top1", value, count, low, high, "share", {**CONTEXT, **context})


def _write(path: Path, *results: Result, step: int = 100, level: float = 0.95) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  ov_eval.write_results(
    path, results, split="heldout", step=step, examples_seen=64 * step, level=level
  )
  return str(path)


def _run(workdir: Path, *values: float) -> str:
  """Create a workdir with these values at steps 100, 200, ..."""
  for number, value in enumerate(values, 1):
    _write(workdir / f"evaluations/{100 * number}.json", _top1(value), step=100 * number)
    _write(workdir / "evaluation.json", _top1(value), step=100 * number)
  return str(workdir)


def test_of_several_runs_the_table_shows_the_last_evaluation(tmp_path: Path):
  found = read([_run(tmp_path / "b", 0.1, 0.2, 0.3), _run(tmp_path / "a", 0.4)])
  assert [(e.run, e.step) for e in found.rows] == [("b", 300), ("a", 100)]
  assert [e.examples_seen for e in found.rows] == [19200, 6400]
  assert [(e.run, e.step) for e in found.all] == [("b", 100), ("b", 200), ("b", 300), ("a", 100)]


def test_of_one_run_the_table_shows_every_evaluation(tmp_path: Path):
  workdir = _run(tmp_path / "a", *(0.1 for _ in range(10)))  # step 1000 follows 900
  found = read([workdir])
  assert [e.step for e in found.rows] == list(range(100, 1001, 100)) and found.all == found.rows
  assert labels(found.rows)[:2] == ["a @ 100", "a @ 200"]


def test_files_are_separate_rows(tmp_path: Path):
  _run(tmp_path / "a", 0.1, 0.2, 0.3)
  early, last = tmp_path / "a/evaluations/100.json", tmp_path / "a/evaluation.json"
  other = _write(tmp_path / "results/other.json", _top1(0.9))
  found = read([str(last), str(early), other, str(early)])  # a path given twice is shown once
  assert labels(found.rows) == ["a @ 300", "a @ 100", "other.json"]


def test_a_workdir_without_earlier_evaluations_and_one_without_the_last(tmp_path: Path):
  _write(tmp_path / "a/evaluation.json", _top1(0.1))
  _write(tmp_path / "b/evaluations/100.json", _top1(0.2), step=100)
  _write(tmp_path / "b/evaluations/20.json", _top1(0.3), step=20)
  found = read([str(tmp_path / "a"), str(tmp_path / "b")])
  assert [(e.run, e.step) for e in found.rows] == [("a", 100), ("b", 100)]


def test_runs_with_equal_names_are_distinguished(tmp_path: Path):
  paths = [_run(tmp_path / where, 0.1) for where in ("x/run", "y/run", "z")]
  assert [e.run for e in read(paths).rows] == ["x/run", "y/run", "z"]


def test_metrics_are_aligned_in_the_requested_order(tmp_path: Path):
  words, nll = Result("caption_words", 9.0, 5), Result("caption_nll", 2.0, 5, unit="nats")
  paths = [
    _write(tmp_path / "a.json", words, _top1(0.1)),
    _write(tmp_path / "b.json", nll, _top1(0.2)),
  ]
  rows = read(paths).rows
  found = columns(rows, first=("zero_shot_top1", "caption_nll"))
  assert [c.name for c in found] == ["zero_shot_top1", "caption_nll", "caption_words"]
  assert [r and r.value for r in found[1].results] == [None, 2.0]
  assert [c.name for c in columns(rows, "nll|top")] == ["zero_shot_top1", "caption_nll"]
  with pytest.raises(
    ValueError, match="--metrics=psnr matches none of caption_words, zero_shot_top1"
  ):
    columns(rows, "psnr")
  with pytest.raises(ValueError, match=r"--metrics=\( is not a regular expression"):
    columns(rows, "(")


def test_one_metric_of_several_data_sets_is_several_columns(tmp_path: Path):
  pets, cars = _top1(0.1), _top1(0.2, split="cars/test")
  paths = [
    _write(tmp_path / "a.json", pets, cars),
    _write(tmp_path / "b.json", _top1(0.3, split="cars/test")),
  ]
  found = columns(read(paths).rows)
  assert [(c.detail, [r and r.value for r in c.results]) for c in found] == [
    ("pets/test", [0.1, None]),
    ("cars/test", [0.2, 0.3]),
  ]
  assert not any(c.differences for c in found) and found[1].best == {1}
  with pytest.raises(ValueError, match="a.json contains zero_shot_top1 twice with the same"):
    columns(read([_write(tmp_path / "a.json", pets, pets)]).rows)


@pytest.mark.parametrize(
  "changed, expected",
  [
    ({"split": "cars/test"}, "split of zero_shot_top1: pets/test (a) against cars/test (b)"),
    ({"templates_hash": "cd34"}, "templates_hash of zero_shot_top1: ab12 (a) against cd34 (b)"),
    ({"preprocessing": "crop"}, "preprocessing of zero_shot_top1: squash (a) against crop (b)"),
    ({"evaluator": "knn"}, "evaluator of zero_shot_top1: zero_shot (a) against knn (b)"),
    ({"count": 101}, "number of examples of zero_shot_top1: 100 (a) against 101 (b)"),
  ],
)
def test_incomparable_rows_give_a_warning_and_have_no_best(
  tmp_path: Path, changed: Any, expected: str
):
  paths = [_write(tmp_path / "a.json", _top1(0.1)), _write(tmp_path / "b.json", _top1(**changed))]
  found = columns(read(paths).rows)
  assert warnings(found, ["a", "b"]) == [expected] and found[0].best == frozenset()


def test_a_missing_property_differs_from_a_given_one(tmp_path: Path):
  bare = Result("zero_shot_top1", 0.5, 100, unit="share")
  paths = [_write(tmp_path / "a.json", _top1(0.1)), _write(tmp_path / "b.json", bare)]
  found = warnings(columns(read(paths).rows), ["a", "b"])
  assert "templates_hash of zero_shot_top1: ab12 (a) against not given (b)" in found


def test_one_difference_of_several_metrics_is_reported_once(tmp_path: Path):
  def both(**change: str) -> list[Result]:
    return ov_eval.with_context(
      [Result("top1", 0.1, 9), Result("top5", 0.2, 9)], **{**CONTEXT, **change}
    )

  paths = [
    _write(tmp_path / "a.json", *both()),
    _write(tmp_path / "b.json", *both(split="cars/test")),
    _write(tmp_path / "c.json", *both()),
  ]
  found = columns(read(paths).rows)
  assert warnings(found, "abc") == ["split of top1, top5: pets/test (a, c) against cars/test (b)"]
  assert warnings(found, ["x", "b", "x"]) == [
    "split of top1, top5: pets/test (x) against cars/test (b)"
  ]


@pytest.mark.parametrize(
  "name, better",
  [
    ("zero_shot_top1", 1), ("img2txt_r10", 1), ("cider", 1), ("attribute_accuracy/colour", 1),
    ("caption_nll", -1), ("caption_perplexity", -1), ("txt2img_median_rank", -1),
    ("generated_words", 0), ("distinct_captions", 0), ("probe_l2", 0), ("majority_top1", 0),
  ],
)  # fmt: skip
def test_direction_of_metrics(name: str, better: int):
  assert direction(Result(name, 0.5, 1)) == better


def test_the_best_rows_are_marked(tmp_path: Path):
  values = {"a": (0.5, 2.0, 1.0), "b": (0.7, 1.5, 1.0), "c": (0.7, math.nan, 1.0)}
  paths = [
    _write(
      tmp_path / f"{name}.json",
      _top1(top1),
      Result("caption_nll", nll, 9),
      Result("cider", same, 9),
    )
    for name, (top1, nll, same) in values.items()
  ]
  found = columns(read(paths).rows)
  # Two rows share the best value; the lowest NLL is best; equal values have no best.
  assert [set(c.best) for c in found] == [{1, 2}, {1}, set()]


def test_one_row_alone_is_not_best(tmp_path: Path):
  assert columns(read([_write(tmp_path / "a.json", _top1())]).rows)[0].best == frozenset()


def _table(tmp_path: Path, width: int = 10_000) -> str:
  nll = Result("caption_nll", 2.0, 5, 1.5, 2.5, "nats")
  paths = [
    _write(tmp_path / "small.json", _top1(0.25), nll),
    _write(tmp_path / "large_long.json", _top1(0.5, split="cars/test"), step=2000, level=0.9),
    _write(tmp_path / "third.json", nll, Result("cider", math.nan, 3)),
  ]
  rows = read(paths).rows
  return text_table.render(rows, columns(rows), width)


def test_table(tmp_path: Path):
  rows, *notes = _table(tmp_path).split("\n\n")
  assert rows.splitlines() == [
    "                  step  samples  zero_shot_top1 !     caption_nll   cider",
    "small.json         100    6,400  25.0%  15.0 – 35.0%  2  1.5 – 2.5  –",
    "large_long.json  2,000  128,000  50.0%  40.0 – 60.0%  –             –",
    "third.json         100    6,400      –                2  1.5 – 2.5  –",
  ]
  assert notes == [
    "! not comparable: split of zero_shot_top1: pets/test (small.json) against cars/test "
    "(large_long.json)\nintervals: 90%, 95%, over examples"
  ]


def test_a_narrow_terminal_splits_the_table_into_blocks(tmp_path: Path):
  *blocks, _ = _table(tmp_path, width=60).split("\n\n")
  assert len(blocks) == 2
  assert all(len(line) <= 60 for block in blocks for line in block.splitlines())
  assert blocks[1].splitlines()[1].split()[0] == "small.json"
  assert len(_table(tmp_path, width=1).split("\n\n")) == 4  # at least one metric in each block


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "no such file or folder"),
    ("{", "is not a results file"),
    ("[]", "is not a results file"),
    ('{"a": 1}', "is not a results file .KeyError: 'results'"),
    (
      '{"split": "x", "step": 1, "examples_seen": 1, "level": 0.9, "results": []}',
      "contains no metric",
    ),
    (
      '{"split": "x", "step": 1, "examples_seen": "many", "level": 0.9, "results": '
      '[{"name": "a", "value": 1, "count": 1, "unit": "", "interval": null}]}',
      "Expected `int`, got `str` - at `\\$.examples_seen`",
    ),
    ("[" * 100_000, "is not a results file"),
  ],
)
def test_files_that_are_not_metrics_are_rejected(tmp_path: Path, content: str | None, message: str):
  path = tmp_path / "evaluation.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=message) as error:
    read([str(path)])
  assert str(path) in str(error.value)


def test_a_workdir_that_was_not_evaluated(tmp_path: Path):
  with pytest.raises(ValueError, match="has no evaluation.json"):
    read([str(tmp_path)])


_GOOD = {
  "split": "x",
  "step": 1,
  "examples_seen": 2,
  "level": 0.9,
  "results": [{"name": "a", "value": 1, "count": 1, "unit": "", "interval": [0, 2]}],
}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    *((field, value) for field in ("step", "examples_seen", "level") for value in ("1", [], None)),
    ("step", -1),
    ("step", 10**30),
    ("examples_seen", 1.5),
    ("level", 1),
    ("split", ["a"]),
    ("results", {}),
    ("results", [1]),
    ("results", None),
  ],
)
def test_wrong_types_name_the_file(tmp_path: Path, field: str, value: Any):
  _refused(tmp_path, {**_GOOD, field: value})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("name", 3),
    ("name", ""),
    ("name", "a\x1b[2J"),
    ("name", ["a"]),
    ("value", "1"),
    ("value", 10**400),
    ("value", 1e300),
    ("value", {}),
    ("count", 1.5),
    ("count", -1),
    ("count", 10**30),
    ("unit", None),
    ("unit", "a\nb"),
    ("interval", 3),
    ("interval", [1]),
    ("interval", [1, "2"]),
    ("interval", [1, math.inf]),
    ("context", []),
    ("context", {"split": ["a"]}),
    ("context", {"evaluator": {"a": 1}}),
    ("context", {"split": "a\nb"}),
  ],
)
def test_wrong_types_of_a_metric_name_the_file(tmp_path: Path, field: str, value: Any):
  (row,) = _GOOD["results"]
  _refused(tmp_path, {**_GOOD, "results": [{**row, field: value}]})


def _refused(tmp_path: Path, content: dict[str, Any]) -> None:
  path = tmp_path / "evaluation.json"
  path.write_text(json.dumps(_GOOD))
  assert columns(read([str(path)]).rows)[0].name == "a"
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="evaluation.json") as error:
    columns(read([str(path)]).rows)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
