"""Tests of the table of formats: names, and the import cost of listing them."""

import subprocess
import sys

from apps.exporter.formats.table import EXPORTS, FORMATS, IMPORTS
from ov_convert import client_env


def test_names_are_unique_and_every_format_is_exported_or_imported():
  assert len({form.name for form in FORMATS}) == len(FORMATS)
  assert {*EXPORTS, *IMPORTS} == {form.name for form in FORMATS}
  assert list(EXPORTS)[0] == "safetensors"  # the default of --format


def test_scripts_exist_and_options_have_a_default():
  for form in EXPORTS.values():
    assert (client_env.SCRIPTS / form.client).is_file()
    assert all(isinstance(option.resolve(None), option.kind) for option in form.options)


def test_listing_formats_imports_no_large_library():
  code = "import sys, apps.exporter.formats.table; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == "False\n"
