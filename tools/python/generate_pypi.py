"""Writes @pypi, with the interpreter of the environment that it describes.

BUILD.bazel      the tool chain, and a py_library for each distribution of the locks
locked/NAME.txt  the pins of NAME and of all that it needs: a target's cache key changes with these, not with the lock
modules.json     importable module -> distributions that bring it, e.g. {"PIL": ["pillow"]}

venv/bin/python3 generate_pypi.py OUTPUT requirements.lock [requirements-tpu.lock ...]
"""

import collections
import importlib.metadata
import json
import pathlib
import re
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

exports_files(["modules.json"])

py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{python} -S",
)

py_runtime_pair(
    name = "runtimes",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtimes",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""


def target(name: str) -> str:
  """The name of a distribution as a target: lower case, underscores."""
  return canonicalize_name(name).replace("-", "_")


def main(output: pathlib.Path, locks: list[pathlib.Path]) -> None:
  pins = {
    target(name) for lock in locks for name in re.findall(r"^([\w.-]+)==", lock.read_text(), re.M)
  }
  installed = {target(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
  locked = {
    name: dist for name, dist in installed.items() if name in pins
  }  # without those for other platforms

  (output / "locked").mkdir(exist_ok=True)
  build = HEADER.format(python=output / "venv/bin/python3")
  for name in sorted(locked):
    pinned = "".join(f"{n}=={locked[n].version}\n" for n in sorted(closure(name, locked)))
    (output / "locked" / f"{name}.txt").write_text(pinned)
    build += f'\npy_library(name = "{name}", data = ["locked/{name}.txt"])\n'
  (output / "BUILD.bazel").write_text(build)
  (output / "modules.json").write_text(json.dumps(modules(locked), indent=1, sort_keys=True) + "\n")


def closure(name: str, locked: dict) -> set[str]:
  """`name` and everything that it needs on this machine, extras such as etils[epath] followed."""
  seen, todo = set(), [(name, "")]
  while todo:
    name, extra = todo.pop()
    if (name, extra) in seen or name not in locked:
      continue
    seen.add((name, extra))
    for line in locked[name].requires or []:
      need = Requirement(line)
      if need.marker is None or need.marker.evaluate({"extra": extra}):
        todo += [(target(need.name), e) for e in ("", *need.extras)]
  return {name for name, _ in seen}


def modules(locked: dict) -> dict[str, list[str]]:
  """Distributions by module; a module that several bring (google) is told apart by its children (google.protobuf)."""
  brings = collections.defaultdict(set)
  for name, dist in locked.items():
    for path in dist.files or []:
      if path.suffix in (".py", ".so") and ".." not in path.parts:
        parts = [part.split(".")[0] for part in path.parts]
        brings[parts[0]].add(name)
        brings[".".join(parts[:2])].add(name)
  return {
    module: sorted(names)
    for module, names in brings.items()
    if "." not in module or len(brings[module.split(".")[0]]) > 1
  }


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).absolute(), [pathlib.Path(lock) for lock in sys.argv[2:]])
