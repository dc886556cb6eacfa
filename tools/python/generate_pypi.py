"""Write the repository @pypi. Run this with the interpreter of the environment.

BUILD.bazel      the toolchain, and a py_library for each distribution in the locks
locked/NAME.txt  the pins of NAME and its dependencies; a change rebuilds the targets that use NAME

venv/bin/python3 generate_pypi.py OUTPUT requirements.lock [requirements-tpu.lock ...]
"""

import importlib.metadata
import pathlib
import re
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

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
  """Return the target name of a distribution: lower case, underscores."""
  return canonicalize_name(name).replace("-", "_")


def main(output: pathlib.Path, locks: list[pathlib.Path]) -> None:
  pinned = "\n".join(lock.read_text() for lock in locks)
  pins = {target(name) for name in re.findall(r"^([\w.-]+)==", pinned, re.M)}
  installed = {target(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
  locked = {name: installed[name] for name in pins & set(installed)}

  (output / "locked").mkdir(exist_ok=True)
  build = HEADER.format(python=output / "venv/bin/python3")
  for name in sorted(pins):
    versions = [f"{need}=={locked[need].version}\n" for need in sorted(closure(name, locked))]
    (output / "locked" / f"{name}.txt").write_text("".join(versions))
    build += f'\npy_library(name = "{name}", data = ["locked/{name}.txt"])\n'
  (output / "BUILD.bazel").write_text(build)


def closure(name: str, locked: dict) -> set[str]:
  """Return `name` and its dependencies on this machine, including extras such as etils[epath]."""
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


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).absolute(), [pathlib.Path(lock) for lock in sys.argv[2:]])
