"""Run the examples of each README, with only that package and those it requires on the path."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest


@pytest.mark.parametrize("readme", sorted(pathlib.Path("packages").glob("*/README.md")), ids=str)
def test_example(readme, tmp_path):
  examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.S)
  assert examples, f"{readme} has no Python block"
  done = subprocess.run(
    [sys.executable, "-c", "\n".join(examples)],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": ":".join(map(str, _path(readme.parent.absolute())))},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def _path(package):
  """Return the folders of a package and of the packages of this repository that it requires."""
  required = tomllib.loads((package / "pyproject.toml").read_text())["project"]["dependencies"]
  own = [re.match(r"ov-\w+", line) for line in required]
  return [package, *(package.parent / found[0] for found in own if found)]
