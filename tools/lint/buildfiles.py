"""Read the targets, sources and dependencies of BUILD.bazel files.

The syntax of a BUILD file is also valid Python, so the file runs as Python with its functions
defined here.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import re
import sys
from typing import Any

BUILD = "BUILD.bazel"
_MACROS = "//tools/python:defs.bzl"
_KINDS = {"ov_py_library": "library", "ov_py_binary": "binary", "ov_py_test": "test"}
_OTHER_RULES = ("alias", "config_setting", "exports_files", "filegroup", "genrule", "licenses")
_NATIVE_PYTHON = ("py_library", "py_binary", "py_test")


@dataclasses.dataclass(frozen=True)
class Target:
  """A Python target; paths are relative to the root, labels are absolute."""

  label: str
  kind: str  # "library", "binary" or "test"
  srcs: tuple[str, ...]
  deps: tuple[str, ...]
  build: str  # the BUILD file
  line: int


def full_label(label: str, package: str) -> str:
  """Return the absolute label //a/b:c for a label in a BUILD file of `package`."""
  if label.startswith(":"):
    return f"//{package}{label}"
  if "//" not in label:
    return f"//{package}:{label}"
  return label if ":" in label else f"{label}:{label.rsplit('/', 1)[-1]}"


def glob(directory: pathlib.Path, include: list[str], exclude: list[str]) -> list[str]:
  """Return matching files below `directory`, excluding subdirectories that are Bazel packages."""

  def regex(pattern: str) -> str:
    # In fnmatch, * also matches "/"; in Bazel only ** does.
    pieces = re.split(r"(\*\*/|\*\*|\*)", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return "".join(special.get(piece) or re.escape(piece) for piece in pieces)

  wanted = re.compile("|".join(map(regex, include)) or "(?!)")
  unwanted = re.compile("|".join(map(regex, exclude)) or "(?!)")
  found = []
  for folder, folders, files in os.walk(directory):
    here = pathlib.Path(folder)
    folders[:] = [name for name in folders if not (here / name / BUILD).exists()]
    paths = [(here / name).relative_to(directory).as_posix() for name in files]
    found += [p for p in paths if wanted.fullmatch(p) and not unwanted.fullmatch(p)]
  return sorted(found)


def read(root: pathlib.Path, build: str) -> list[Target]:
  """Return the ov_py_* targets of one BUILD file.

  Raises:
    ValueError: if the file uses an unsupported construct; the message has its location.
  """
  path = root / build
  package = pathlib.PurePosixPath(build).parent.as_posix().removeprefix(".")
  targets: list[Target] = []

  def define(kind: str) -> Callable[..., None]:
    def rule(name: str, srcs: list[str], deps: Sequence[str] = (), **_: Any) -> None:
      files = tuple(pathlib.PurePosixPath(package, src).as_posix() for src in srcs)
      labels = tuple(full_label(dep, package) for dep in deps)
      line = sys._getframe(1).f_lineno
      targets.append(Target(f"//{package}:{name}", kind, files, labels, build, line))

    return rule

  def refuse(name: str) -> Callable[..., None]:
    def rule(**_: Any) -> None:
      line = sys._getframe(1).f_lineno
      raise ValueError(f"{build}:{line}: {name}; write ov_{name} of //tools/python:defs.bzl")

    return rule

  def load(bzl: str, *names: str) -> None:
    if bzl != _MACROS:
      constants: dict[str, Any] = {}
      file = root / bzl.removeprefix("//").replace(":", "/")
      exec(compile(file.read_text(), bzl, "exec"), constants)
      scope.update({name: constants[name] for name in names})

  def ignore(*_: Any, **__: Any) -> None:
    return None

  scope: dict[str, Any] = dict.fromkeys(("package", *_OTHER_RULES), ignore)
  scope |= {name: refuse(name) for name in _NATIVE_PYTHON}
  scope |= {name: define(kind) for name, kind in _KINDS.items()}
  scope["load"] = load
  scope["glob"] = lambda include, exclude=(), **_: glob(path.parent, include, list(exclude))
  try:
    exec(compile(path.read_text(), build, "exec"), scope)
  except NameError as error:
    raise ValueError(f"{build}: {error}; tools/lint/buildfiles.py does not know it") from error
  return targets
