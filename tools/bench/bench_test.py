"""Run the app as a user does, on the smallest cases of each benchmark."""

import functools
import json
from pathlib import Path

from absl import flags
import pytest

from tools.bench import bench, results, tables
from tools.testing import program

_app = functools.partial(program.run, bench)


@pytest.mark.parametrize(
  "name, only, rows",
  [
    ("startup", "alone|help/(tpu|export)|import/tpu", 4),
    ("startup", "first step/from", 1),
    ("compile", "stacked/2$", 1),
    ("step", "84 px", 1),
    ("memory", "2, full", 1),
    ("input", "WebP, 84 px", 1),
    ("checkpoint", "save/Ti", 1),
    ("eval", "zero-shot/scores$", 1),
  ],
)
def test_each_benchmark_writes_its_schema(name, only, rows, tmp_path: Path):
  (tmp_path / "page.md").write_text(f"<!-- bench {name} -->\n<!-- end {name} -->\n")
  done = _app(
    name, f"--only={only}", "--rounds=1", "--out=out.json", "--page=page.md", cwd=tmp_path
  )
  assert done.returncode == 0, done.stderr
  found = results.read(str(tmp_path / "out.json"))
  (benchmark,) = found["benchmarks"]
  assert benchmark["name"] == name and benchmark["rounds"] == 1
  assert found["command"].startswith(f"tools/bazel run //tools/bench -- {name}")
  assert len(benchmark["rows"]) == rows
  for row in benchmark["rows"]:
    assert row["metrics"]
    assert all(value["median"] > 0 for value in row["metrics"].values())
  assert tables.render(found) in done.stdout
  assert tables.render(found) in (tmp_path / "page.md").read_text()
  assert f"[bench] {name} 1/" in done.stderr and "eta" in done.stderr


def test_two_files_are_compared(tmp_path: Path):
  value = {"values": [1.0] * 5, "median": 1.0, "low": 1.0, "high": 1.0}
  row = {"name": "a", "ratio": False, "metrics": {"cpu_s": value}}
  benchmark = {
    "name": "toy", "about": "", "dtype": None, "batch": None, "rounds": 5, "exact": False,
    "notes": [], "rows": [row], "goals": [],
  }  # fmt: skip
  found = {
    "schema": results.SCHEMA, "date": "2026-11-26", "command": "", "machine": results.machine(),
    "benchmarks": [benchmark],
  }  # fmt: skip
  (tmp_path / "old.json").write_text(json.dumps(found))
  value |= {"values": [2.0] * 5, "median": 2.0, "low": 2.0, "high": 2.0}
  (tmp_path / "new.json").write_text(json.dumps(found))
  done = _app("--compare", "old.json", "new.json", cwd=tmp_path)
  assert done.returncode == 1
  assert done.stdout.startswith("slower  toy: a, CPU s: 1 -> 2 (+100.0%)\n1 worse")
  done = _app("--compare", "new.json", "old.json", cwd=tmp_path)
  assert done.returncode == 0 and done.stdout.startswith("faster")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "no benchmark is named; expected some of startup, compile, step"),
    (["speed"], "unknown speed; expected some of startup, compile, step"),
    (["startup", "--only=("], "--only=( is not a regular expression"),
    (["startup", "--only=nothing"], "--only=nothing leaves no case of startup"),
    (["startup", "--out=missing/out.json"], "--out=missing/out.json; expected a file in a folder"),
    (["startup", "--page=page.md"], "page.md: No such file or directory"),
    (["learning", "eval"], "learning trains on simulated devices; run it without other benchmarks"),
    (["eval", "--runs=runs"], "--runs and --figures belong to learning; leave them out"),
    (["learning", "--figures=missing"], "--figures=missing; expected a folder that exists"),
    (["--compare", "old.json"], "--compare takes two files, old and new; got 1"),
    (["--compare", "old.json", "new.json"], "old.json: No such file or directory"),
  ],
)
def test_mistakes_give_one_line_errors(arguments, message, tmp_path: Path):
  done = _app(*arguments, cwd=tmp_path)
  assert done.returncode == 2
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_command_of_a_table_has_its_flags():
  flags.FLAGS.mark_as_parsed()
  assert bench.command_of(["compile"]) == "tools/bazel run //tools/bench -- compile"
