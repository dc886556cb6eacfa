"""The site builds without a warning, and opens without a server."""

import pathlib
import re
import shutil

from docs import build_site


def test_the_site_builds(tmp_path: pathlib.Path):
  out = tmp_path / "html"
  # Bazel's files are links, which MyST would follow out of the source folder.
  unused = shutil.ignore_patterns(".*", "build", "__pycache__")
  root = shutil.copytree(pathlib.Path.cwd(), tmp_path / "root", ignore=unused)
  assert build_site.build(root, out) == 0, "Sphinx printed an error or a warning above"
  page = (out / "docs/index.html").read_text("utf-8")
  for address in re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"]+)"', page):
    assert (out / "docs" / address.partition("?")[0].partition("#")[0]).exists(), address
  assert "docs/index.html" in (out / "index.html").read_text("utf-8")
  names = ("models", "losses", "sharding", "data", "eval", "convert", "serve")
  for name in (f"ov_{name}" for name in names):
    reference = (out / f"docs/api/{name}.html").read_text("utf-8")
    assert reference.count('<dt class="sig') > 5, name
