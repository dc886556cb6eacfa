"""Import rules between the folders of this repository. ARCHITECTURE.md gives the reasons."""

from tools.lint.imports import Import, module_name
from tools.lint.tree import Tree, Violation, distributions_of, is_test

# The distributions that the library of a package may import, by their names in @pypi.
LIBRARY = {
  "ov_models": {"jax", "jaxtyping", "flax", "einops", "numpy", "safetensors"},
  "ov_losses": {"jax", "jaxtyping", "flax", "einops", "numpy"},
  "ov_sharding": {"jax", "flax", "einops", "numpy"},
  "ov_eval": {"jax", "numpy", "regex", "scipy"},
  "ov_data": {
    "cykooz_resizer", "google_crc32c", "numpy", "pillow", "protobuf", "simplejpeg", "tokenizers",
  },
  "ov_convert": {"jax", "numpy", "safetensors"},
  "ov_serve": {
    "jax", "msgspec", "numpy", "pillow", "prometheus_client", "starlette", "usearch", "uvicorn",
  },
}  # fmt: skip
# Distributions that it may import only inside functions, so that they are optional.
DEFERRED = {
  "ov_data": {"array_record", "etils", "pyarrow", "tensorflow_cpu", "tensorflow_datasets"},
  "ov_convert": {"orbax_checkpoint"},
}
# Distributions that only its tests may import.
TEST = {"chex", "pytest"}
TEST_OF = {
  "ov_data": {"array_record", "pyarrow", "tensorflow_cpu", "tensorflow_datasets"},
  "ov_eval": {"scikit_learn"},
}
# Scripts of the clients' environment: allowed imports besides the standard library and each other.
CLIENT_SCRIPTS = ("packages/ov-convert/ov_convert/clients/", "tools/learning/clients/")
CLIENT_HOOK = "tools/python/openvision_torchvision.py"
CLIENT_TEST = "tests/clients/run_clip_benchmark.py"
CLIENTS = {
  "numpy", "PIL", "safetensors", "torch", "torchvision", "open_clip", "open_clip_train", "timm",
  "transformers", "onnx", "onnxruntime", "jax", "clip_benchmark",
}  # fmt: skip
# The packages that a package may import. Unlisted packages import no other package.
SIBLINGS = {"ov_convert": {"ov_models"}, "ov_serve": {"ov_models", "ov_data", "ov_eval"}}
# This tool compiles the train step of an app, so it creates the task of the app.
COMPILES_APPS = "tools/preflight/"


def check(tree: Tree) -> list[Violation]:
  """Check that no import breaks an import rule."""
  violations = []
  for path, imports in tree.imports.items():
    for found in imports:
      if is_client_script(path):
        rule = _client_rule(tree, found)
      elif tree.is_own(found):
        rule = _own_rule(path, found)
      elif path.startswith("packages/") and tree.is_foreign(found):
        rule = _foreign_rule(path, found)
      else:
        rule = None
      if rule:
        violations.append(Violation(path, found.line, f"imports {found.module}, but {rule}"))
  return violations


def is_client_script(path: str) -> bool:
  """Return whether a file runs in the clients' environment."""
  return path.startswith(CLIENT_SCRIPTS) or path in (CLIENT_HOOK, CLIENT_TEST)


def _client_rule(tree: Tree, found: Import) -> str | None:
  neighbour = any(f"{folder}{found.top}.py" in tree.files for folder in CLIENT_SCRIPTS)
  if neighbour or found.top in CLIENTS or not (tree.is_own(found) or tree.is_foreign(found)):
    return None
  return f"scripts of the clients' environment may import only {', '.join(sorted(CLIENTS))}"


def _own_rule(path: str, found: Import) -> str | None:
  """Return the import rule between folders of this repository that an import breaks."""
  name = f"{found.module}.{found.name}."
  trainer = name.startswith("apps.trainer.")
  if path.startswith("packages/"):
    package = module_name(path).split(".")[0]
    siblings = SIBLINGS.get(package, set())
    if found.top not in {package, *siblings}:
      return (
        f"of this repository {package} may import only {', '.join([package, *sorted(siblings)])}"
      )
  elif path.startswith("apps/trainer/"):
    if found.top in ("tools", "tests") or (found.top == "apps" and not trainer):
      return "apps/trainer knows no task: it imports packages and itself"
  elif path.startswith("apps/"):
    if found.top in ("tools", "tests"):
      return "apps import packages and apps"
  elif path.startswith("tools/"):
    inside = trainer or name.startswith("apps.demo.") or path.startswith(COMPILES_APPS)
    if found.top == "tests" or (found.top == "apps" and not inside):
      return "tools import packages, apps.trainer, apps.demo and tools"
  return None


def _foreign_rule(path: str, found: Import) -> str | None:
  """Return the import rule of a package that an import of a library breaks."""
  package = module_name(path).split(".")[0]
  installed_by = distributions_of(found)
  allowed = LIBRARY.get(package, set())
  if is_test(path):
    allowed = allowed | TEST | TEST_OF.get(package, set())
  later = installed_by & DEFERRED.get(package, set())
  if installed_by & allowed or (later and found.deferred):
    return None
  if later:
    return f"{package} may do so inside functions only"
  return f"{package} may import only {', '.join(sorted(allowed))}"
