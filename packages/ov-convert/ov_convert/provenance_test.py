"""Tests of the licence, name and citation of imported folders."""

import json

import pytest

from ov_convert import provenance

CARD = """---
tags:
- vision
license: {license}
license_name: fair-noncommercial
license_link: 'https://example.org/licence'
---
# A Tower

Text.

```bibtex
@article{{tower, title={{A Tower}}, url={{https://example.org/a/b}}}}
```
"""


@pytest.mark.parametrize(
  ("stated", "expected"), [("apache-2.0", "apache-2.0"), ("other", "fair-noncommercial")]
)
def test_card(stated, expected, tmp_path):
  (tmp_path / "README.md").write_text(CARD.format(license=stated))
  (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "org/a-tower"}))
  assert provenance.read(tmp_path) == {
    "license": expected,
    "license_link": "https://example.org/licence",
    "name": "org/a-tower",
    "citation": "@article{tower, title={A Tower}, url={https://example.org/a/b}}",
  }


def test_licence_file_and_heading(tmp_path):
  (tmp_path / "README.md").write_text("# A Tower\n")
  (tmp_path / "LICENSE").write_text("MIT License\n\nPermission ...")
  (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "../me/tower"}))
  assert provenance.read(tmp_path) == {"license": "MIT License", "name": "A Tower"}


def test_files_that_are_not_read(tmp_path):
  outside = tmp_path / "outside"
  outside.write_text("license")
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "LICENSE").symlink_to(outside)
  (folder / "README.md").write_text("x" * (2 << 20))
  (folder / "config.json").write_text("[" * 100_000)
  assert provenance.read(folder) == {}
