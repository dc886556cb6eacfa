"""Docstrings become reStructuredText that Sphinx reads without a warning."""

from docs.docstrings import to_rst


def test_code_and_markup():
  assert to_rst(["Read `x`s of *.bin, |z| and name_."]) == [
    r"Read ``x``\ s of \*.bin, \|z\| and name\_."
  ]


def test_fields_without_a_header_become_attributes():
  lines = ["A source.", "", "path: of the data,", "  or several.", "split: a part."]
  assert to_rst(lines) == [
    "A source.", "", "Attributes:", "  path: of the data,", "    or several.", "  split: a part."
  ]  # fmt: skip


def test_sections_stay():
  lines = ["Return it.", "", "Args:", "  x: a value.", "", "Returns:", "  It."]
  assert to_rst(lines) == lines


def test_indented_blocks_become_literal():
  assert to_rst(["Use:", "", "  f(*x)", "", "Done."]) == [
    "Use:", "", "::", "", "  f(*x)", "", "Done."
  ]  # fmt: skip


def test_examples_stay():
  lines = ["Double.", "", "Examples:", "  >>> f(*x) | y", "  2"]
  assert to_rst(lines) == lines


def test_lists_stay():
  lines = ["Rules:", "", "- One", "  or two.", "- Three."]
  assert to_rst(lines) == lines
