"""Find the imports of Python files without running them."""

import ast
import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Import:
  """One imported name: `from a.b import c` gives module a.b, name c."""

  line: int
  module: str
  name: str | None
  deferred: bool  # inside a function or under TYPE_CHECKING: not executed at import time

  @property
  def top(self) -> str:
    return self.module.split(".")[0]


def module_name(path: str) -> str:
  """Return the module of a file: packages/ov-data/ov_data/index.py is ov_data.index."""
  parts = pathlib.PurePosixPath(path).with_suffix("").parts
  if parts[0] == "packages":
    parts = parts[2:]
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: pathlib.Path, path: str) -> list[Import]:
  """Return all imports of a file; relative imports are resolved."""
  package = module_name(path).split(".")
  if not path.endswith("__init__.py"):
    package = package[:-1]
  found: list[Import] = []

  def visit(node: ast.AST, deferred: bool) -> None:
    if isinstance(node, ast.Import):
      found.extend(Import(node.lineno, alias.name, None, deferred) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) + 1 - node.level] if node.level else []
      module = ".".join([*base, *filter(None, [node.module])])
      found.extend(Import(node.lineno, module, alias.name, deferred) for alias in node.names)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      deferred = True
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
      deferred = True
    for child in ast.iter_child_nodes(node):
      visit(child, deferred)

  visit(ast.parse((root / path).read_text(), path), False)
  return found
