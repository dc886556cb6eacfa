"""Runs a program of this repository as the user does, for tests of what it prints and returns."""

import os
from pathlib import Path
import subprocess
import sys
from types import ModuleType


def run(module: ModuleType, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
  """What became of `python -m MODULE ARGUMENTS`, output as text.

  Args:
    module: has a main; it sees the packages that this process sees.
    cwd: folder the user stands in, as `bazel run` tells it.
  """
  path = os.pathsep.join(os.path.abspath(p or ".") for p in sys.path)
  return subprocess.run(
    [sys.executable, "-m", module.__name__, *arguments],
    env={**os.environ, "PYTHONPATH": path, "BUILD_WORKING_DIRECTORY": str(cwd)},
    capture_output=True,
    text=True,
    check=False,
  )
