"""Install packages of this repository with pip, and run the examples of their READMEs.

python3 tests/standalone/pip_install_check.py [ov-models ...]

Requires Python 3.11 or newer with venv, and a package index. For each package (default: all),
creates an empty environment, installs only its directory and those of the packages that it
requires, lists the dependencies, and runs the first Python block of its README. Fails if tensorflow
or torch is installed as a dependency.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import tomllib

PACKAGES = pathlib.Path(__file__).parents[2] / "packages"
HEAVY = {"tensorflow", "tensorflow-cpu", "torch"}


def main(names: list[str]) -> None:
  for name in names or sorted(path.name for path in PACKAGES.iterdir()):
    with tempfile.TemporaryDirectory() as folder:
      check(name, pathlib.Path(folder))


def check(name: str, folder: pathlib.Path) -> None:
  start = time.monotonic()
  subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
  python = folder / "venv/bin/python"
  pip = [python, "-m", "pip", "--disable-pip-version-check"]
  subprocess.run([*pip, "install", "--quiet", *required(name)], check=True)
  listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True)
  versions = {dist["name"]: dist["version"] for dist in json.loads(listed.stdout)}
  print(f"{name}: installed in {time.monotonic() - start:.0f} s:")
  print(" ", " ".join(f"{dist}=={version}" for dist, version in sorted(versions.items())))
  if heavy := HEAVY & set(versions):
    sys.exit(f"{name} pulled in {', '.join(sorted(heavy))}, which it must work without")

  example = re.search(r"```python\n(.*?)```", (PACKAGES / name / "README.md").read_text(), re.S)
  if not example:
    sys.exit(f"{PACKAGES / name / 'README.md'} has no Python block to run")
  subprocess.run([python, "-c", example[1]], cwd=folder, check=True)
  print(f"{name}: the README's example ran; {time.monotonic() - start:.0f} s in all", flush=True)


def required(name: str) -> list[pathlib.Path]:
  """Return the directories of a package and of the packages of this repository that it requires."""
  project = tomllib.loads((PACKAGES / name / "pyproject.toml").read_text())["project"]
  own = [re.match(r"ov-\w+", line) for line in project["dependencies"]]
  return [*(PACKAGES / found[0] for found in own if found), PACKAGES / name]


if __name__ == "__main__":
  main(sys.argv[1:])
