import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench import results, tables
from tools.bench.harness import Benchmark, Case, Goal, Ratio

TOY = Benchmark(
  "toy",
  "A toy.",
  [Case("a", dict), Case("b", dict)],
  [Ratio("a", "b")],
  [Goal("a", "cpu_s", 3.0), Goal("a : b", "cpu_s", 0.25)],
  dtype="float32",
  batch=8,
  notes=["c is left out"],
)
VALUES: dict[str, dict[str, list[float]]] = {
  "a": {"cpu_s": [3, 1, 2], "instructions": [1234, 1234, 1234]},
  "b": {"cpu_s": [6, 2, 4], "instructions": [12, 12, 12]},
  "a : b": {"cpu_s": [0.5, 0.5, 0.5]},
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
  return results.to_dict([(TOY, VALUES, 3)], "tools/bazel run //tools/bench -- toy")


def test_results_round_trip(found: dict[str, Any], tmp_path: Path):
  (tmp_path / "out.json").write_text(json.dumps(found))
  assert results.read(str(tmp_path / "out.json")) == found
  (benchmark,) = found["benchmarks"]
  assert benchmark["rows"][0]["metrics"]["cpu_s"] == {
    "values": [3, 1, 2], "median": 2, "low": 1, "high": 3
  }  # fmt: skip
  assert [row["ratio"] for row in benchmark["rows"]] == [False, False, True]
  assert [goal["reached"] for goal in benchmark["goals"]] == [True, False]
  assert found["machine"]["cores"] >= 1 and found["machine"]["device"].endswith("cpu")


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("schema", 1, r"Invalid enum value 1 - at `\$.schema`"),
    ("date", None, r"Expected `str`, got `null` - at `\$.date`"),
    ("machine.cores", "two", r"Expected `int`, got `str` - at `\$.machine.cores`"),
    ("benchmarks.0.rows.0.metrics.cpu_s.median", None, r"at `\$.benchmarks\[0\].rows\[0\].metrics"),
    ("benchmarks.0.goals.0.reached", "yes", r"at `\$.benchmarks\[0\].goals\[0\].reached`"),
  ],
)
def test_a_wrong_field_is_an_error(found, path, value, message, tmp_path: Path):
  changed = copy.deepcopy(found)
  *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
  parent = changed
  for key in parents:
    parent = parent[key]
  parent[last] = value
  (tmp_path / "out.json").write_text(json.dumps(changed))
  with pytest.raises(ValueError, match=f"out.json is not a file of --out: .*{message}"):
    results.read(str(tmp_path / "out.json"))


def test_files_of_older_versions_are_read(found: dict[str, Any], tmp_path: Path):
  older = copy.deepcopy(found)
  older["benchmarks"][0]["plots"] = []
  (tmp_path / "out.json").write_text(json.dumps(older))
  assert results.read(str(tmp_path / "out.json"))["date"] == found["date"]


def test_other_files_are_rejected(tmp_path: Path):
  (tmp_path / "other.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"other.json is not a file of --out: Expected `object`"):
    results.read(str(tmp_path / "other.json"))


def test_tables(found: dict[str, Any]):
  text = tables.render(found)
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert "| a | 2.00 (1.00 to 3.00) | 1,234 |" in lines
  assert "| b | 4.00 (2.00 to 6.00) | 12 |" in lines
  assert "| a : b | 0.50 |" in lines
  assert "| a, CPU s | at most 3.00 | 2.00 | 0.67 | reached |" in lines
  assert "| a : b, CPU s | at most 0.25 | 0.50 | 2.00 | not reached |" in lines
  assert "float32, batch 8" in text and "`tools/bazel run //tools/bench -- toy`" in text
  assert lines[-1] == "c is left out."


def test_tables_of_a_page_are_replaced_between_the_marks(found: dict[str, Any], tmp_path: Path):
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- bench toy -->\nold\n<!-- end toy -->\nafter\n")
  tables.put_into(page, found)
  tables.put_into(page, found)  # replacing is idempotent
  text = page.read_text()
  assert text.startswith("before\n<!-- bench toy -->\nA toy.")
  assert text.endswith("c is left out.\n<!-- end toy -->\nafter\n")
  assert "old" not in text
  page.write_text("no marks")
  with pytest.raises(ValueError, match="has no section of toy; expected <!-- bench toy -->"):
    tables.put_into(page, found)
