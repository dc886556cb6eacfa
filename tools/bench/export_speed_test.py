"""The app, as the user runs it, on a tower that takes no time."""

import functools
import json
from pathlib import Path

from tools.bench import export_speed
from tools.testing import program

_app = functools.partial(program.run, export_speed)


def test_table_and_figures(tmp_path: Path):
  done = _app(
    "--model=mu/16", "--image_size=32", "--batch=2", "--rounds=3", "--threads=1",
    "--engines=jax,timm,torch", "--out=speed.json", cwd=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "speed.json").read_text("utf-8"))
  assert export_speed.table(result) in done.stdout
  assert result["model"] == "mu/16" and result["threads"] == 1
  assert list(result["engines"]) == ["jax", "timm", "torch"]
  for row in result["engines"].values():
    assert len(row["rounds"]) == 3 and row["wall"] > 0
    assert row["difference"] < 1e-5  # one block of float32: all engines compute the same
  assert result["engines"]["jax"]["wall_ratio"] == 1


def test_mistakes_are_told_before_anything_starts(tmp_path: Path):
  done = _app("--engines=jax,tensorflow", cwd=tmp_path)
  assert done.returncode == 2 and "tensorflow" in done.stderr
  done = _app("--engines=timm", cwd=tmp_path)
  assert done.returncode == 2 and "the first must be jax" in done.stderr
  done = _app("--threads=100000", cwd=tmp_path)
  assert done.returncode == 2 and "--threads=100000" in done.stderr
