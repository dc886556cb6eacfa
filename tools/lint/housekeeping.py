"""Check required files, files without a target, and forbidden text."""

import re

from tools.lint.tree import Tree, Violation

PACKAGE_FILES = ("BUILD.bazel", "CHANGELOG.md", "README.md", "pyproject.toml")
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:root|work|opt|home/\w+|Users/\w+)/\w+")
INDEX = re.compile(r"--(extra-)?index-url|--find-links")


def check_files(tree: Tree) -> list[Violation]:
  """Check that required files exist and that every Python file and test has a target."""
  wanted = [f"packages/{package}/{name}" for package in tree.packages for name in PACKAGE_FILES]
  violations = [Violation(path, 1, "is missing") for path in wanted if path not in tree.files]
  for path in tree.python_files:
    kinds = {owner.kind for owner in tree.owners[path]}
    if path.endswith("_test.py") and "test" not in kinds:
      violations.append(Violation(path, 1, "no ov_py_test of a BUILD.bazel runs it"))
    elif not kinds and tree.read(path):  # an empty __init__.py needs no target
      violations.append(Violation(path, 1, "is in the srcs of no target of a BUILD.bazel"))
  for target in tree.targets:
    for src in sorted(set(target.srcs) - set(tree.files)):
      violations.append(
        Violation(target.build, target.line, f"{target.label} names {src}, which is not there")
      )
  return violations


def check_words(tree: Tree) -> list[Violation]:
  """Check that no file contains a machine-specific path, and no lock a package index."""
  violations = []
  for path in tree.files:
    try:
      lines = tree.read(path).splitlines()
    except UnicodeDecodeError:
      continue  # images and arrays
    for number, line in enumerate(lines, 1):
      if match := MACHINE_PATH.search(line):
        violations.append(Violation(path, number, f"{match[0]} is a path of one machine"))
      if path.endswith(".lock") and INDEX.search(line):
        violations.append(Violation(path, number, "names a package index; users have their own"))
  return violations
