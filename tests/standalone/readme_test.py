"""The examples in a package's README run one after another, with that package alone on the path."""

import os
import pathlib
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize("readme", sorted(pathlib.Path("packages").glob("*/README.md")), ids=str)
def test_example(readme, tmp_path):
  examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.S)
  assert examples, f"{readme} has no Python block"
  done = subprocess.run(
    [sys.executable, "-c", "\n".join(examples)],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(readme.parent.absolute())},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
