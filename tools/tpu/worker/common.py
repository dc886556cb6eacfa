"""What the worker's program shares: where things lie, and how commands are run.

The modules of this folder run on the Python that a fresh machine has, 3.8 and later, alone.
"""

from __future__ import annotations

import os
from pathlib import Path
import re
import subprocess

HOME = Path.home()
CODE, RUNS, LIBTPU = HOME / "ov-code", HOME / "ov-run", HOME / "ov-libtpu.so"
PYTHON = HOME / "ov-python"  # holds the path of the environment's interpreter


class Refused(Exception):
  """Ends the program with this line."""


def python() -> str:
  return needs(PYTHON, "tpu setup").read_text()


def environment() -> dict[str, str]:
  """Of the apps: our code on the path, and a libtpu of the user's where there is one."""
  packages = sorted(str(p.parent) for p in CODE.glob("packages/*/pyproject.toml"))
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(CODE), *packages]), PYTHONUNBUFFERED="1")
  if LIBTPU.exists():
    env["TPU_LIBRARY_PATH"] = str(LIBTPU)
  return env


def needs(path: Path, command: str) -> Path:
  if not path.exists():
    raise Refused(f"{path.name} is not here; first run: {command}")
  return path


def tool(command: list[str], failure: str) -> str:
  """What a command printed; its last words where it failed."""
  try:
    done = subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
  except FileNotFoundError:
    raise Refused(f"{failure}: there is no {command[0]}") from None
  except subprocess.TimeoutExpired:
    raise Refused(f"{failure}: no answer in 600 s") from None
  if done.returncode:
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    raise Refused(f"{failure}: {words[-1] if words else f'exit code {done.returncode}'}")
  return done.stdout.decode("utf-8", "replace")


def last_lines(path: Path, size: int = 65536) -> list[str]:
  """The last lines of a file that may be long or missing."""
  try:
    with open(path, "rb") as file:
      file.seek(max(0, os.path.getsize(path) - size))
      text = file.read().decode("utf-8", "replace")
  except OSError:
    return []
  return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def last_words(log: Path) -> str:
  lines = last_lines(log) or ["it said nothing"]
  return f"{lines[-1][:300]} (all of it is in {log.name} on this worker)"
