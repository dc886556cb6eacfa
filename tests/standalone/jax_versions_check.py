"""Run the tests of the JAX packages with the oldest and the newest libraries that they allow.

python3.11 -m tests.standalone.jax_versions_check --newest_python=python3.13 [ov-losses ...]
python3.13 -m tests.standalone.jax_versions_check --only=newest

Requires a package index and, as the newest jax requires a newer Python than the packages, two
interpreters with venv. Creates an environment per package with the lower bounds of its
pyproject.toml, and one with the newest releases. Nothing is installed from the checkout. Prints
the versions and the number of passed, failed and skipped tests; fails if any test failed. Tests
of exports run if OV_CLIENTS_PYTHON is set (CONTRIBUTING.md).

With --environments=FOLDER, environments are kept there and reused.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from xml.etree import ElementTree

from tools.python import simulated_devices

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("ov-sharding", "ov-losses", "ov-models", "ov-eval", "ov-convert")
# Packages that the tests import, in addition to those of the package.
TOOLS = ("beartype", "chex", "jaxtyping", "pytest", "scikit-learn")
VERSIONS = "import jax, sys; print(sys.version.split()[0], jax.__version__)"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("packages", nargs="*", choices=[*NAMES, []], metavar="package")
  parser.add_argument("--only", choices=["oldest", "newest"])
  parser.add_argument("--newest_python", default=sys.executable, metavar="PYTHON")
  parser.add_argument("--environments", type=pathlib.Path, metavar="FOLDER")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = (flags.environments or pathlib.Path(temporary)).absolute()
    results = []
    for name in flags.packages or NAMES:
      bounds = requirements(name)
      oldest = [bound.replace(">=", "==") for bound in bounds]
      newest = {re.split("[>;]", bound)[0] for other in NAMES for bound in requirements(other)}
      for label, python, packages in (
        (f"{name}-oldest", sys.executable, oldest),
        ("newest", flags.newest_python, sorted(newest)),
      ):
        if label.endswith(flags.only or ""):
          interpreter = environment(folder / label, python, packages)
          results.append(run(name, label, interpreter))
  print("", *(line for line, _ in results), sep="\n")
  sys.exit(any(failed for _, failed in results))


def requirements(name: str) -> list[str]:
  """Return the bounds of a package, its extras, and the sibling packages that it requires."""
  text = (ROOT / "packages" / name / "pyproject.toml").read_text("utf-8")
  project = tomllib.loads(text)["project"]
  found = []
  for bound in project["dependencies"]:
    sibling = bound.split(">")[0]
    found += requirements(sibling) if sibling in NAMES else [bound]
    if sibling == "jax":  # its own bound on jaxlib is too low
      found.append(bound.replace("jax", "jaxlib"))
  return found + sum(project.get("optional-dependencies", {}).values(), [])


def environment(folder: pathlib.Path, python: str, packages: list[str]) -> str:
  """Create an environment with these packages, if it does not exist, and return its Python."""
  interpreter = folder / "bin/python"
  if not (folder / "complete").exists():
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [interpreter, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    # One file of open_clip is read; its dependencies include PyTorch.
    alone = [name for name in packages if name.startswith("open_clip_torch")]
    others = [name for name in packages if name not in alone]
    for group in [[*others, *TOOLS], *(["--no-deps", name] for name in alone)]:
      if subprocess.run([*pip, *group]).returncode:
        sys.exit(f"pip with {python} cannot install {' '.join(group)}")
    (folder / "complete").touch()
  return str(interpreter)


def run(name: str, label: str, python: str) -> tuple[str, int]:
  """Run the tests of a package; return a line with the counts, and the number of failures."""
  versions = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True)
  title = "{} ({}): Python {}, jax {}".format(name, label, *versions.stdout.split())
  print(f"\n{title}", flush=True)
  files, not_run = test_files(name)
  counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
  start = time.monotonic()
  for devices, group in sorted(files.items()):
    for key, count in run_pytest(python, devices, group).items():
      counts[key] += count
  failed = counts["failures"] + counts["errors"]
  passed = counts["tests"] - failed - counts["skipped"]
  seconds = time.monotonic() - start
  skipped = counts["skipped"]
  line = f"{title}: {passed} passed, {failed} failed, {skipped} skipped, {seconds:.0f} s"
  if not_run:
    line += f"; {not_run} files not run: set OV_CLIENTS_PYTHON (CONTRIBUTING.md)"
  return line, failed


def test_files(name: str) -> tuple[dict[int, list[pathlib.Path]], int]:
  """Return test files by number of devices, and how many require PyTorch, which is missing."""
  folder, not_run = ROOT / "packages" / name, 0
  files: dict[int, list[pathlib.Path]] = {}
  for target in (folder / "BUILD.bazel").read_text("utf-8").split("ov_py_test(")[1:]:
    (source,) = re.findall(r'srcs = \["(.*)"\]', target)
    devices = int((re.findall(r"devices = (\d+)", target) or [1])[0])
    if "clients = True" in target and "OV_CLIENTS_PYTHON" not in os.environ:
      not_run += 1
    elif folder / source not in files.setdefault(devices, []):  # in two tiers
      files[devices].append(folder / source)
  return files, not_run


def run_pytest(python: str, devices: int, files: list[pathlib.Path]) -> dict[str, int]:
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / "report.xml"
    variables = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "OV_ALL_CONTEXTS": "1",
      "PYTHONPATH": "",
      "XLA_FLAGS": simulated_devices.xla_flags(devices),
    }
    options = ["-q", "-rfEs", "--continue-on-collection-errors", f"--junitxml={report}"]
    process = subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, env=variables)
    if not report.exists():
      sys.exit(f"pytest did not finish: exit code {process.returncode}")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}


if __name__ == "__main__":
  main()
