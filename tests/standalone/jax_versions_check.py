"""Run the tests of foreign JAX code with the oldest and the newest jax that a package allows.

python3 tests/standalone/jax_versions_check.py [ov-losses] [ov-models]

Needs Python 3.11 or newer with venv, and a package index; the newest jax may need a newer Python.
For each package it makes an empty environment with the lower bound of jax in its pyproject.toml,
and one with the newest jax that pip finds, installs the package, and runs its foreign_jax_test.py
on two simulated devices.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

PACKAGES = pathlib.Path(__file__).parents[2] / "packages"
NAMES = ("ov-losses", "ov-models")


def main(names: list[str]) -> None:
  failed = [
    f"{name} with {label} jax"
    for name in names or NAMES
    for label, pins in (("the oldest", oldest(name)), ("the newest", []))
    if not passes(name, label, pins)
  ]
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")


def oldest(name: str) -> list[str]:
  """Return pins of jax and jaxlib at the lower bound of a package."""
  bound = re.search(r'"jax>=([\d.]+)', (PACKAGES / name / "pyproject.toml").read_text("utf-8"))
  if bound is None:
    sys.exit(f"{name}/pyproject.toml has no lower bound of jax")
  return [f"jax=={bound[1]}", f"jaxlib=={bound[1]}"]


def passes(name: str, label: str, pins: list[str]) -> bool:
  """Install a package with these pins and run its test; return whether that passed."""
  test = PACKAGES / name / name.replace("-", "_") / "foreign_jax_test.py"
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = f"{folder}/bin/python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, PACKAGES / name, "pytest", *pins], check=True)
    version = subprocess.run(
      [python, "-c", "import jax; print(jax.__version__)"],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()
    print(f"{name} with {label} jax, {version}", flush=True)
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "OV_ALL_CONTEXTS": "1",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    run = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    return not subprocess.run(run, env=environment, cwd=folder).returncode


if __name__ == "__main__":
  main(sys.argv[1:])
