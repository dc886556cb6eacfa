"""Configuration of the documentation site. The source folder is the root of the repository.

READMEs and the pages of docs/ are read where they are, so that their links work in the checkout, on
a code host and on the site.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1].absolute()
sys.path.insert(0, str(ROOT))

from docs.docstrings import to_rst  # noqa: E402

PACKAGES = ["ov_models", "ov_losses", "ov_sharding", "ov_data", "ov_eval", "ov_convert", "ov_serve"]

project = "OpenVision"
author = copyright = "the OpenVision authors"
root_doc = "docs/index"
include_patterns = [
  "docs/**.md",
  "docs/api/*.rst",
  "packages/*/README.md",
  "packages/*/CHANGELOG.md",
  "tests/golden/README.md",
  "apps/configs/README.md",
  "tools/*/README.md",
  "tools/tpu/launch.md",
  "ARCHITECTURE.md",
  "CHANGELOG.md",
  "CONTRIBUTING.md",
]

extensions = [
  "myst_parser",
  "autoapi.extension",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

napoleon_use_ivar = True
autoapi_dirs = [str(ROOT / "packages" / name.replace("_", "-") / name) for name in PACKAGES]
autoapi_generate_api_docs = False
autoapi_ignore = ["*_test.py", "*/clients/*", "*/testing*.py"]
autoapi_options = ["members", "imported-members"]
autodoc_member_order = "bysource"

# Annotations such as `Config` name different types in different modules; they stay without a link.
suppress_warnings = ["ref.python"]

html_theme = "sphinx_book_theme"
html_title = "OpenVision"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_redirect"]  # index.html in the output's root leads to docs/index.html
html_copy_source = False
html_theme_options = {
  "use_download_button": False,
  "navbar_persistent": [],
  "navbar_end": [],
  "show_toc_level": 1,
}


def skip_imported(app, what, name, obj, skip, options):
  """Document a name once: in its package, or in the module of ov-convert that defines it."""
  return skip or (getattr(obj, "imported", False) and obj.id.count(".") > 1)


def convert_docstring(app, what, name, obj, options, lines):
  """Convert a docstring in place."""
  lines[:] = to_rst(lines)


def setup(app):
  """Connect the functions above."""
  app.connect("autodoc-skip-member", skip_imported)
  app.connect("autodoc-process-docstring", convert_docstring, priority=400)  # before Napoleon
