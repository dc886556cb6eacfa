"""Build the documentation site: tools/bazel run //docs:html. Warnings are errors."""

import argparse
import os
import pathlib
import subprocess
import sys


def find_python() -> str:
  """Return the interpreter of the docs environment: $OV_DOCS_PYTHON, or the one Bazel installed.

  Raises:
    FileNotFoundError: there is none.
  """
  if named := os.environ.get("OV_DOCS_PYTHON"):
    return named
  for folder in pathlib.Path(__file__).absolute().parents:
    file = folder / "docs" / "interpreter.txt"
    if folder.name.endswith(".runfiles") and file.exists():
      return file.read_text().strip()
  raise FileNotFoundError(
    "no environment with Sphinx: use tools/bazel run //docs:html, or set OV_DOCS_PYTHON to the "
    "python of an environment with tools/python/requirements-docs.lock"
  )


def build(root: pathlib.Path, out: pathlib.Path) -> int:
  """Build the site.

  Args:
    root: root of the repository.
    out: folder of the pages.

  Returns:
    Exit code of Sphinx: 0 if there is neither an error nor a warning.
  """
  kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
  command = [find_python(), "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "auto"]
  folders = ["-d", out.parent / "doctrees", "-c", root / "docs", root, out]
  environment = {**kept, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}
  return subprocess.run([*command, *folders], env=environment, check=False).returncode


def main() -> int:
  """Build the site of the workspace."""
  root = pathlib.Path(os.environ.get("BUILD_WORKSPACE_DIRECTORY", ".")).absolute()
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", help="folder of the pages; docs/build/html by default")
  if given := parser.parse_args().out:
    out = pathlib.Path(os.environ.get("BUILD_WORKING_DIRECTORY", "."), given).absolute()
  else:
    out = root / "docs/build/html"
  code = build(root, out)
  if code == 0:
    print(f"open {out}/index.html")
  return code


if __name__ == "__main__":
  sys.exit(main())
