"""The rules of CONTRIBUTING.md hold in this repository."""

import pathlib

import pytest

from tools.lint import agreement, housekeeping, walls
from tools.lint.tree import Tree

TREE = Tree(pathlib.Path.cwd())


@pytest.mark.parametrize(
  "check",
  [
    walls.check,
    agreement.check_deps,
    agreement.check_pyproject,
    housekeeping.check_files,
    housekeeping.check_words,
  ],
  ids=["walls", "deps", "pyproject", "files", "words"],
)
def test_rule(check):
  assert len(TREE.targets) > 20, "the test does not see the tree"
  faults = check(TREE)
  assert not faults, "\n".join([check.__doc__, *map(str, faults)])
