"""Check the spelling of text and names with codespell and its settings in pyproject.toml."""

import os
import pathlib

import codespell_lib

from tools.lint.tree import Tree

_SUFFIXES = (".py", ".md", ".bzl", ".bazel", ".toml", ".sh", ".in", ".html")


def check(*files):
  """Return the exit code of codespell, which prints misspelled words with their location."""
  return codespell_lib.main("--toml=pyproject.toml", *files)


def test_spelling():
  files = [path for path in Tree(pathlib.Path.cwd()).files if path.endswith(_SUFFIXES)]
  assert len(files) > 500, "the test does not see the tree"
  assert check(*files) == os.EX_OK


def test_misspelled_words_are_found(tmp_path, capsys):
  (tmp_path / "a.md").write_text("Rec{}ve the tensor.\n".format("ie"))
  assert check(str(tmp_path / "a.md")) == os.EX_DATAERR
  assert "==> Receive" in capsys.readouterr().out
