"""Run a program of this repository as a user does, for tests of its output and exit code."""

import os
from pathlib import Path
import subprocess
import sys
from types import ModuleType


def run(module: ModuleType, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
  """Run `python -m MODULE ARGUMENTS` and return the result with its output as text.

  Args:
    module: module to run; it can import the same packages as this process.
    cwd: working directory of the user, passed like `bazel run` does.
  """
  path = os.pathsep.join(os.path.abspath(p or ".") for p in sys.path)
  return subprocess.run(
    [sys.executable, "-m", module.__name__, *arguments],
    env={**os.environ, "PYTHONPATH": path, "BUILD_WORKING_DIRECTORY": str(cwd)},
    capture_output=True,
    text=True,
    check=False,
  )
