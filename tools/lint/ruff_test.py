"""Check lint and format of every Python file with the ruff settings of pyproject.toml."""

import pathlib
import subprocess

import pytest
import ruff

from tools.lint.tree import Tree


@pytest.mark.parametrize(
  "command", [["check"], ["format", "--check", "--diff"]], ids=["lint", "format"]
)
def test_ruff(command):
  files = Tree(pathlib.Path.cwd()).python_files
  assert len(files) > 50, "the test does not see the tree"
  done = subprocess.run(
    [ruff.find_ruff_bin(), *command, "--no-cache", "--config=pyproject.toml", *files],
    capture_output=True,
    text=True,
  )
  fix = "To fix what can be fixed automatically: tools/bazel run //tools/lint:fix"
  assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{fix}"
