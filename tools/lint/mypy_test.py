"""Type check packages/, apps/ and tools/ with the mypy settings of pyproject.toml."""

import pathlib
import sys

import mypy.api

from tools.lint.tree import Tree, is_test


def test_mypy(tmp_path):
  files = [
    path
    for path in Tree(pathlib.Path.cwd()).python_files
    if path.startswith(("packages/", "apps/", "tools/")) and not is_test(path)
  ]
  assert len(files) > 20, "the test does not see the tree"
  report, errors, status = mypy.api.run(
    [f"--cache-dir={tmp_path}", f"--python-executable={sys.executable}", *files]
  )
  assert status == 0, report + errors
