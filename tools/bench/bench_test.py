"""The app, as the user runs it, on the smallest cases of each benchmark."""

import functools
import json
from pathlib import Path

from absl import flags
import pytest

from tools.bench import bench, results, tables
from tools.preflight import topology
from tools.testing import program

_app = functools.partial(program.run, bench)


@pytest.mark.parametrize(
  "name, only, rows",
  [
    ("startup", "alone|help/(tpu|export)|import/launch", 4),
    ("startup", "first step/from", 1),
    ("compile", "stacked/2$", 1),
    ("step", "84 px", 1),
    ("loss", "devices, ring", 1),
    ("memory", "2 B/16 @ 224, full", 2),
    ("memory_state", "2 B/16", 9),
    ("memory_compiled", "L/14 @ 84, full", 3),
    ("data", "WebP, 84 px", 1),
    ("checkpoint", "save/Ti, npz", 1),
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
    assert all(figure["median"] > 0 for figure in row["metrics"].values())
  assert tables.render(found) in done.stdout
  assert tables.render(found) in (tmp_path / "page.md").read_text()
  assert f"[bench] {name} 1/" in done.stderr and "eta" in done.stderr


def test_two_files_are_compared(tmp_path: Path):
  figure = {"values": [1.0] * 5, "median": 1.0, "low": 1.0, "high": 1.0}
  row = {"name": "a", "ratio": False, "metrics": {"cpu_s": figure}}
  benchmark = {
    "name": "toy", "about": "", "dtype": None, "batch": None, "rounds": 5, "exact": False,
    "notes": [], "rows": [row], "goals": [], "plots": [],
  }  # fmt: skip
  found = {
    "schema": results.SCHEMA, "date": "2026-11-26", "command": "", "machine": results.machine(),
    "benchmarks": [benchmark],
  }  # fmt: skip
  (tmp_path / "old.json").write_text(json.dumps(found))
  figure |= {"values": [2.0] * 5, "median": 2.0, "low": 2.0, "high": 2.0}
  (tmp_path / "new.json").write_text(json.dumps(found))
  done = _app("--compare", "old.json", "new.json", cwd=tmp_path)
  assert done.returncode == 1
  assert done.stdout.startswith("slower  toy: a, CPU s: 1 -> 2 (+100.0%)\n1 worse")
  done = _app("--compare", "new.json", "old.json", cwd=tmp_path)
  assert done.returncode == 0 and done.stdout.startswith("faster")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "name what to measure; there are startup, compile, compile_tpu"),
    (["speed"], "there is no benchmark speed; there are startup, compile, compile_tpu"),
    (["startup", "--only=("], "--only=( is no regular expression"),
    (["startup", "--only=nothing"], "--only=nothing leaves no case of startup"),
    (["startup", "--out=missing/out.json"], "--out=missing/out.json; expected a file in a folder"),
    (["startup", "--page=page.md"], "page.md: No such file or directory"),
    (["--compare", "old.json"], "--compare takes two files, old and new; got 1"),
    (["--compare", "old.json", "new.json"], "old.json: No such file or directory"),
  ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path: Path):
  done = _app(*arguments, cwd=tmp_path)
  assert done.returncode == 2
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(topology.has_libtpu(), reason="libtpu is installed")
def test_what_compiling_for_a_tpu_wants_is_told(tmp_path: Path):
  done = _app("compile_tpu", cwd=tmp_path)
  assert done.returncode == 2 and "compiling for v4-8 needs libtpu" in done.stderr


def test_the_command_of_a_table_brings_the_compiler_it_needs():
  flags.FLAGS.mark_as_parsed()
  plain = "tools/bazel run //tools/bench -- "
  assert bench.command_of(["compile"]) == f"{plain}compile"
  assert bench.command_of(["compile", "compile_tpu"]) == f"OV_EXTRAS=tpu {plain}compile compile_tpu"
