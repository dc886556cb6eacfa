import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench import results, tables
from tools.bench.harness import Benchmark, Case, Goal, Plot, Ratio

TOY = Benchmark(
  "toy",
  "A toy.",
  [Case("a", dict), Case("b", dict)],
  [Ratio("a", "b")],
  [Goal("a", "cpu_s", 3.0), Goal("a : b", "cpu_s", 0.25)],
  dtype="float32",
  batch=8,
  notes=["c is left out"],
  plots=[Plot("CPU by size", "size", "cpu_s", {"line": [(1, "a"), (2, "b")]})],
)
VALUES: dict[str, dict[str, list[float]]] = {
  "a": {"cpu_s": [3, 1, 2], "instructions": [1234, 1234, 1234]},
  "b": {"cpu_s": [6, 2, 4], "instructions": [12, 12, 12]},
  "a : b": {"cpu_s": [0.5, 0.5, 0.5]},
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
  return results.to_dict([(TOY, VALUES, 3)], "tools/bazel run //tools/bench -- toy")


def test_what_is_written_can_be_read(found: dict[str, Any], tmp_path: Path):
  (tmp_path / "out.json").write_text(json.dumps(found))
  assert results.read(str(tmp_path / "out.json")) == found
  (benchmark,) = found["benchmarks"]
  assert benchmark["rows"][0]["metrics"]["cpu_s"] == {
    "values": [3, 1, 2], "median": 2, "low": 1, "high": 3
  }  # fmt: skip
  assert [row["ratio"] for row in benchmark["rows"]] == [False, False, True]
  assert [goal["reached"] for goal in benchmark["goals"]] == [True, False]
  assert found["machine"]["cores"] >= 1 and found["machine"]["device"].endswith("cpu")


def _set(found: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
  """A copy with another value at a path such as benchmarks.0.rows."""
  changed = copy.deepcopy(found)
  *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
  place = changed
  for key in parents:
    place = place[key]
  place[last] = value
  return changed


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("schema", 1, "schema is 1, expected 2"),
    ("date", None, "date is None"),
    ("machine.cores", "two", "cores is 'two'"),
    ("benchmarks.0.surplus", 1, "a benchmark has"),
    ("benchmarks.0.rows.0.metrics.cpu_s.median", 3, "a, cpu_s: median, low and high are not"),
    ("benchmarks.0.rows.0.metrics.cups", {}, "a, cups is unknown"),
    ("benchmarks.0.goals.0.reached", "yes", "reached is 'yes'"),
    ("benchmarks.0.plots.0.title", 1, "a plot of toy: title is 1"),
    ("benchmarks.0.plots.0.metric", "mfu", r"CPU by size: no row has mfu of \['a', 'b'\]"),
    ("benchmarks.0.plots.0.lines", {"x": [[1, "c"]]}, r"no row has cpu_s of \['c'\]"),
  ],
)
def test_what_is_not_so_is_named(found, path, value, message):
  with pytest.raises(ValueError, match=message):
    results.check(_set(found, path, value))


def test_other_files_are_refused(tmp_path: Path):
  path = tmp_path / "other.json"
  path.write_text("[1]")
  with pytest.raises(ValueError, match=r"other.json is no file of figures: the file has"):
    results.read(str(path))


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
  tables.put_into(page, found)  # a second time changes nothing
  text = page.read_text()
  assert text.startswith("before\n<!-- bench toy -->\nA toy.")
  image = "![CPU by size](page/toy-cpu-by-size.svg)"
  assert text.endswith(f"c is left out.\n\n{image}\n<!-- end toy -->\nafter\n")
  assert "old" not in text
  page.write_text("no marks")
  with pytest.raises(ValueError, match="has no place for toy: expected <!-- bench toy -->"):
    tables.put_into(page, found)


def test_plots_of_a_page_are_those_it_shows(found: dict[str, Any], tmp_path: Path):
  page, folder = tmp_path / "page.md", tmp_path / "page"
  page.write_text("<!-- bench toy -->\n<!-- end toy -->\n")
  tables.put_into(page, found)
  (folder / "other.svg").write_text("not of this benchmark")
  assert "CPU by size" in (folder / "toy-cpu-by-size.svg").read_text()
  tables.put_into(page, _set(found, "benchmarks.0.plots.0.title", "Another"))
  assert {path.name for path in folder.iterdir()} == {"toy-another.svg", "other.svg"}
