"""Check that imports, BUILD deps and pyproject dependencies agree."""

import tomllib

from packaging.requirements import Requirement

from tools.lint.buildfiles import Target
from tools.lint.import_rules import is_client_script
from tools.lint.imports import Import, module_name
from tools.lint.tree import Tree, Violation, distributions_of, is_test, target_name

# Optional modules outside the lock that apps import inside functions.
OPTIONAL = {"wandb"}
# The name that users install, for distributions with another name in the lock.
SAME = {"tensorflow": "tensorflow_cpu"}
# Distributions that provide a file which a package reads without importing them.
READ = {"ov_eval": {"clip_benchmark", "open_clip_torch"}}
# The macro ov_py_test adds it.
IMPLIED = "@pypi//:pytest"


def check_deps(tree: Tree) -> list[Violation]:
  """Check that the deps of a target are exactly what its srcs import."""
  return [violation for target in tree.targets for violation in _check_target(tree, target)]


def _check_target(tree: Tree, target: Target) -> list[Violation]:
  libraries = {t.label: t for t in tree.targets}
  brings = {dep: set(libraries[dep].srcs) for dep in target.deps if dep in libraries}
  deps = {*target.deps, IMPLIED} if target.kind == "test" else set(target.deps)
  violations, used = [], set()
  for path in target.srcs:
    for found in tree.imports.get(path, []):
      if is_client_script(path):
        continue  # runs in another environment
      if tree.is_own(found):
        file = tree.file_of(found)
        providers = {dep for dep, srcs in brings.items() if file in srcs}
        used |= providers
        if not providers and file not in target.srcs:
          labels = [owner.label for owner in tree.owners[file]] if file else []
          violations.append(Violation(path, found.line, _missing(target, found, labels)))
      elif tree.is_foreign(found):
        labels = [f"@pypi//:{name}" for name in sorted(distributions_of(found) & set(tree.pins))]
        used.update(labels)
        optional = found.top in OPTIONAL and found.deferred
        if not optional and not deps & set(labels):
          violations.append(Violation(path, found.line, _missing(target, found, labels)))
  packages = {module_name(path).split(".")[0] for path in target.srcs if not is_test(path)}
  used |= {f"@pypi//:{name}" for package in packages for name in READ.get(package, ())}
  for dep in sorted(set(target.deps) - used - {IMPLIED}):
    text = f"{target.label} depends on {dep}, which none of its srcs imports"
    violations.append(Violation(target.build, target.line, text))
  return list(dict.fromkeys(violations))  # `from a import b, c` gives two imports of a


def _missing(target: Target, found: Import, labels: list[str]) -> str:
  if labels:
    return f"imports {found.module}: add {' or '.join(labels)} to the deps of {target.label}"
  if found.top in OPTIONAL:
    return f"imports {found.module}, which users may lack: import it inside a function"
  return f"imports {found.module}, which neither a target nor tools/python/requirements.in provides"


def check_pyproject(tree: Tree) -> list[Violation]:
  """Check that a package's pyproject.toml requires the distributions its library imports."""
  paths = [f"packages/{package}/pyproject.toml" for package in tree.packages]
  return [
    violation for path in paths if path in tree.files for violation in _check_project(tree, path)
  ]


def _check_project(tree: Tree, path: str) -> list[Violation]:
  project = tomllib.loads(tree.read(path))["project"]
  required = [Requirement(line) for line in project.get("dependencies", [])]
  extras = project.get("optional-dependencies", {}).items()
  optional = [Requirement(line) for group, lines in extras if group != "test" for line in lines]
  now, later = _imported(tree, path.split("/")[1])

  def violation(text: str) -> Violation:
    word = text.split()[0]
    rows = tree.read(path).splitlines()
    return Violation(path, next((n for n, row in enumerate(rows, 1) if f'"{word}' in row), 1), text)

  violations = []
  declared, offered = {_pin(need) for need in required}, {_pin(need) for need in optional}
  for name in sorted(now - declared):
    violations.append(violation(f"{name} is imported: add it to dependencies"))
  for name in sorted(later - declared - offered):
    violations.append(
      violation(f"{name} is imported inside functions: add it to optional-dependencies")
    )
  for need in required + optional:
    locked = tree.pins.get(_pin(need), [])
    if _pin(need) not in now | later:
      violations.append(violation(f"{need.name} is declared, but the library does not import it"))
    elif need in required and _pin(need) not in now:
      violations.append(
        violation(f"{need.name} is imported inside functions only: make it optional")
      )
    if not any(bound.operator in (">=", "~=", "==") for bound in need.specifier):
      violations.append(violation(f"{need.name} has no lower bound: write {need.name}>=..."))
    if locked and not any(need.specifier.contains(version) for version in locked):
      violations.append(
        violation(f"{need.name} {need.specifier} excludes the lock's {' and '.join(locked)}")
      )
  return violations


def _imported(tree: Tree, package: str) -> tuple[set[str], set[str]]:
  """Return a package's imports at module level, and those only inside functions."""
  now: set[str] = set()
  later: set[str] = set()
  for path, imports in tree.imports.items():
    of_library = path.startswith(f"packages/{package}/") and not is_test(path)
    if of_library and not is_client_script(path):
      for found in imports:
        if tree.is_foreign(found):
          (later if found.deferred else now).update(distributions_of(found))
        elif tree.is_own(found) and found.top != module_name(path).split(".")[0]:
          (later if found.deferred else now).add(found.top)
  later |= READ.get(package.replace("-", "_"), set())
  return now, later - now


def _pin(need: Requirement) -> str:
  name = target_name(need.name)
  return SAME.get(name, name)
