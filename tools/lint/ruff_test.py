"""Lint and format of every Python file, as pyproject.toml says."""

import pathlib
import subprocess

import pytest
import ruff


@pytest.mark.parametrize(
  "command", [["check"], ["format", "--check", "--diff"]], ids=["lint", "format"]
)
def test_ruff(command):
  files = sorted(
    str(p)
    for top in ("apps", "packages", "tests", "tools")
    for p in pathlib.Path(top).rglob("*.py")
  )
  assert files, "no Python file in the runfiles: the test looks at nothing"
  done = subprocess.run(
    [ruff.find_ruff_bin(), *command, "--no-cache", "--config=pyproject.toml", *files],
    capture_output=True,
    text=True,
  )
  fix = "To fix what can be fixed: tools/bazel run //tools/lint:fix"
  assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{fix}"
