"""The source tree for the checks: files, modules, imports, targets and locked versions."""

import collections
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import sys

from packaging.utils import canonicalize_name

from tools.lint import buildfiles
from tools.lint.imports import Import, imports, module_name

PYTHON_TOPS = ("apps", "docs", "packages", "tests", "tools")
# Modules of distributions that are not installed for some Python versions, so they cannot be found.
LEFT_OUT = {"tensorflow": "tensorflow_cpu"}


@dataclasses.dataclass(frozen=True)
class Violation:
  """A violation of a rule and its location."""

  path: str
  line: int
  text: str

  def __str__(self) -> str:
    return f"{self.path}:{self.line}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Tree:
  """The repository below `root`. Paths are relative to it, with forward slashes."""

  root: pathlib.Path

  @functools.cached_property
  def files(self) -> list[str]:
    """Return all files that are not generated."""
    found = []
    for folder, folders, names in os.walk(self.root):
      folders[:] = [name for name in folders if not _made_by_a_tool(name)]
      found += [(pathlib.Path(folder) / name).relative_to(self.root).as_posix() for name in names]
    return sorted(found)

  @functools.cached_property
  def python_files(self) -> list[str]:
    return [
      path for path in self.files if path.endswith(".py") and path.split("/")[0] in PYTHON_TOPS
    ]

  @functools.cached_property
  def imports(self) -> dict[str, list[Import]]:
    return {path: imports(self.root, path) for path in self.python_files}

  @functools.cached_property
  def modules(self) -> dict[str, str]:
    """Return the modules of this repository and their files."""
    return {module_name(path): path for path in self.python_files}

  @functools.cached_property
  def own(self) -> set[str]:
    """Return the top-level modules of this repository: ov_models, apps, ..."""
    return {module.split(".")[0] for module in self.modules}

  @functools.cached_property
  def packages(self) -> list[str]:
    """Return the names of the packages: ov-data, ov-models, ..."""
    return sorted({path.split("/")[1] for path in self.files if path.startswith("packages/")})

  @functools.cached_property
  def targets(self) -> list[buildfiles.Target]:
    builds = [path for path in self.files if path.split("/")[-1] == buildfiles.BUILD]
    return [target for build in builds for target in buildfiles.read(self.root, build)]

  @functools.cached_property
  def owners(self) -> dict[str, list[buildfiles.Target]]:
    """Return the targets whose srcs contain a file."""
    owners = collections.defaultdict(list)
    for target in self.targets:
      for src in target.srcs:
        owners[src].append(target)
    return owners

  @functools.cached_property
  def pins(self) -> dict[str, list[str]]:
    """Return the locked versions of a distribution; they may depend on the Python version."""
    pins = collections.defaultdict(list)
    lock = (self.root / "tools/python/requirements.lock").read_text()
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.M):
      pins[target_name(name)].append(version)
    return pins

  def read(self, path: str) -> str:
    return (self.root / path).read_text()

  def is_own(self, found: Import) -> bool:
    return found.top in self.own

  def is_foreign(self, found: Import) -> bool:
    """Return whether a module is neither in the standard library nor in this repository."""
    return found.top not in self.own and found.top not in sys.stdlib_module_names

  def file_of(self, found: Import) -> str | None:
    """Return the file in this repository that an import loads, preferably that of a submodule."""
    return self.modules.get(f"{found.module}.{found.name}") or self.modules.get(found.module)


def _made_by_a_tool(folder: str) -> bool:
  hidden = folder.startswith(".") and folder != ".ci"
  return hidden or folder in ("__pycache__", "build") or folder.endswith(".egg-info")


def is_test(path: str) -> bool:
  return path.endswith("_test.py") or path.startswith("tests/")


def target_name(distribution: str) -> str:
  """Return the name of a distribution in @pypi: lower case, underscores."""
  return canonicalize_name(distribution).replace("-", "_")


@functools.cache
def _distributions() -> dict[str, set[str]]:
  brings = collections.defaultdict(set)
  for dist in importlib.metadata.distributions():
    name = target_name(dist.metadata["Name"])
    for file in (dist.read_text("RECORD") or "").splitlines():
      path = file.split(",")[0]
      if path.endswith((".py", ".so")) and not path.startswith(".."):
        module = [part.split(".")[0] for part in path.split("/")[:2]]
        brings[module[0]].add(name)
        brings[".".join(module)].add(name)
  return brings


def distributions_of(found: Import) -> set[str]:
  """Return the distributions that install a module, or a submodule of a namespace like google."""
  parts = [*found.module.split("."), *filter(None, [found.name])]
  whole = _distributions().get(parts[0]) or {*filter(None, [LEFT_OUT.get(parts[0])])}
  return whole if len(whole) < 2 else _distributions().get(".".join(parts[:2]), whole)
