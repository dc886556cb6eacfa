"""Files that must be there, files that a target must own, and words that no file may hold."""

import re

from tools.lint.tree import Fault, Tree

PACKAGE_FILES = ("BUILD.bazel", "CHANGELOG.md", "README.md", "pyproject.toml")
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:root|work|opt|home/\w+|Users/\w+)/\w+")
INDEX = re.compile(r"--(extra-)?index-url|--find-links")


def check_files(tree: Tree) -> list[Fault]:
  """Every package has its files, every Python file its target, every test file its ov_py_test."""
  wanted = [f"packages/{package}/{name}" for package in tree.packages for name in PACKAGE_FILES]
  faults = [Fault(path, 1, "is missing") for path in wanted if path not in tree.files]
  for path in tree.python_files:
    kinds = {owner.kind for owner in tree.owners[path]}
    if path.endswith("_test.py") and "test" not in kinds:
      faults.append(Fault(path, 1, "no ov_py_test of a BUILD.bazel runs it"))
    elif not kinds and tree.read(path):  # an empty __init__.py may be left out
      faults.append(Fault(path, 1, "is in the srcs of no target of a BUILD.bazel"))
  for target in tree.targets:
    for src in sorted(set(target.srcs) - set(tree.files)):
      faults.append(
        Fault(target.build, target.line, f"{target.label} names {src}, which is not there")
      )
  return faults


def check_words(tree: Tree) -> list[Fault]:
  """No file names a place on somebody's machine, no lock where it was resolved."""
  faults = []
  for path in tree.files:
    try:
      lines = tree.read(path).splitlines()
    except UnicodeDecodeError:
      continue  # pictures and arrays
    for number, line in enumerate(lines, 1):
      if match := MACHINE_PATH.search(line):
        faults.append(Fault(path, number, f"{match[0]} is a path of one machine"))
      if path.endswith(".lock") and INDEX.search(line):
        faults.append(Fault(path, number, "names a package index; users have their own"))
  return faults
