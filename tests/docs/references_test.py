"""Tests that docs/references.md, the table of references and the recipes agree."""

from pathlib import Path

import pytest

from apps.configs import base, datacomp, slip
from tools.compare import references

RECIPES = {"datacomp.py": datacomp, "slip.py": slip}
PAGE = Path("docs/references.md").read_text("utf-8")


def test_page_has_the_table():
  """Print `tools.compare.references.table()` to update the page."""
  assert references.table() in PAGE


@pytest.mark.parametrize("reference", references.REFERENCES, ids=lambda reference: reference.name)
def test_recipe_has_the_samples_and_templates_of_the_reference(reference):
  file, _, arguments = reference.config.partition(":")
  config = base.resolve(RECIPES[file].get_config(arguments))
  assert config.total_steps * config.batch_size == reference.samples
  assert config.eval.zero_shot.templates == reference.templates
