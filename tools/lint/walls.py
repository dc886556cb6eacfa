"""The walls: who may import whom. ARCHITECTURE.md tells why they stand where they do."""

from tools.lint.imports import Import, module_name
from tools.lint.tree import Fault, Tree, distributions_of, is_test

# The distributions that the library of a package may import, as @pypi calls them.
LIBRARY = {
  "ov_models": {"jax", "flax", "einops", "numpy", "safetensors"},
  "ov_losses": {"jax", "flax", "einops", "numpy"},
  "ov_sharding": {"jax", "flax", "einops", "numpy"},
  "ov_eval": {"jax", "numpy", "regex", "scipy"},
  "ov_data": {
    "cykooz_resizer", "google_crc32c", "numpy", "pillow", "protobuf", "simplejpeg", "tokenizers",
  },
  "ov_convert": {"jax", "numpy", "safetensors"},
}  # fmt: skip
# Those that it may import inside functions only, so that it is imported and installed without them.
DEFERRED = {
  "ov_data": {"tensorflow_cpu", "tensorflow_datasets", "etils"},
  "ov_convert": {"orbax_checkpoint"},
}
# Those that its tests may import beside.
TEST = {"chex", "pytest"}
TEST_OF = {"ov_data": {"tensorflow_cpu", "tensorflow_datasets"}, "ov_eval": {"scikit_learn"}}
# Scripts that run in the clients' environment: what they may import beside Python and each other.
CLIENT_SCRIPTS = "packages/ov-convert/ov_convert/clients/"
CLIENT_HOOK = "tools/python/openvision_torchvision.py"
CLIENTS = {
  "numpy", "PIL", "safetensors", "torch", "torchvision", "open_clip", "timm", "transformers",
  "onnx", "onnxruntime", "jax",
}  # fmt: skip
# The packages that a package may import. One not named here imports no sibling.
SIBLINGS = {"ov_convert": {"ov_models"}}
# The tool that compiles what an app would run: it makes the app's task.
COMPILES_APPS = "tools/preflight/"


def check(tree: Tree) -> list[Fault]:
  """No import crosses a wall."""
  faults = []
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
        faults.append(Fault(path, found.line, f"imports {found.module}, but {rule}"))
  return faults


def is_client_script(path: str) -> bool:
  """Whether a file runs in the clients' environment and not in ours."""
  return path.startswith(CLIENT_SCRIPTS) or path == CLIENT_HOOK


def _client_rule(tree: Tree, found: Import) -> str | None:
  neighbour = f"{CLIENT_SCRIPTS}{found.top}.py" in tree.files
  if neighbour or found.top in CLIENTS or not (tree.is_own(found) or tree.is_foreign(found)):
    return None
  return f"scripts of the clients' environment may import only {', '.join(sorted(CLIENTS))}"


def _own_rule(path: str, found: Import) -> str | None:
  """The wall between rooms of this repository that an import breaks."""
  trainer = f"{found.module}.{found.name}.".startswith("apps.trainer.")
  if path.startswith("packages/"):
    room = module_name(path).split(".")[0]
    siblings = SIBLINGS.get(room, set())
    if found.top not in {room, *siblings}:
      return f"of this repository {room} may import only {', '.join([room, *sorted(siblings)])}"
  elif path.startswith("apps/trainer/"):
    if found.top in ("tools", "tests") or (found.top == "apps" and not trainer):
      return "apps/trainer knows no task: it imports packages and itself"
  elif path.startswith("apps/"):
    if found.top in ("tools", "tests"):
      return "apps import packages and apps"
  elif path.startswith("tools/"):
    inside = trainer or path.startswith(COMPILES_APPS)
    if found.top == "tests" or (found.top == "apps" and not inside):
      return "tools import packages, apps.trainer and tools"
  return None


def _foreign_rule(path: str, found: Import) -> str | None:
  """The wall around a package that an import of a foreign library breaks."""
  room = module_name(path).split(".")[0]
  brought_by = distributions_of(found)
  allowed = LIBRARY.get(room, set())
  if is_test(path):
    allowed = allowed | TEST | TEST_OF.get(room, set())
  later = brought_by & DEFERRED.get(room, set())
  if brought_by & allowed or (later and found.deferred):
    return None
  if later:
    return f"{room} may do so inside functions only"
  return f"{room} may import only {', '.join(sorted(allowed))}"
