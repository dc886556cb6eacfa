"""Check the rules of CONTRIBUTING.md in this repository."""

import pathlib

import pytest

from tools.lint import agreement, housekeeping, import_rules, language
from tools.lint.tree import Tree

TREE = Tree(pathlib.Path.cwd())


@pytest.mark.parametrize(
  "check",
  [
    import_rules.check,
    agreement.check_deps,
    agreement.check_pyproject,
    housekeeping.check_files,
    housekeeping.check_words,
    language.check_language,
  ],
  ids=["import rules", "deps", "pyproject", "files", "words", "language"],
)
def test_rule(check):
  assert len(TREE.targets) > 20, "the test does not see the tree"
  violations = check(TREE)
  assert not violations, "\n".join([check.__doc__, *map(str, violations)])
