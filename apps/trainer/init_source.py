"""Sources of initial parameters: checkpoints of this or of the released code, and exports.

  source = open_source("/data/released/checkpoint.npz", step=None, part="params")
  source.arrays["encoder/cls"]  # shape and dtype; nothing is on a device yet

All sources are folders. A workdir of this code has `checkpoints/<step>/state`, one of the released
code `checkpoint.npz/<step>/default`; a published repository has the latter in `jax_orbax_weight`.
An export is a folder written by `//apps:export --format=safetensors`.
"""

from collections.abc import Callable, Mapping
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

from etils import epath
import jax
import numpy as np

from apps.trainer.checkpoint import (
  CheckpointError,
  absolute_path,
  find_checkpoint,
  read_metadata,
  restore_arrays,
  saved_arrays,
)
from apps.trainer.paths import flatten_paths
from ov_convert import orbax_folder, torch_module
from ov_convert.name_map import unflatten
from ov_convert.release import Imported
import ov_models

Part = Literal["params", "ema"]
Read = Callable[[Mapping[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]

_ADAPTERS = f"{ov_models.ADAPTERS}/"
_EXPECTED = (
  "expected the workdir of a run, its checkpoints folder or one step of it, of the published code "
  "a workdir, its checkpoint.npz folder or one step of it, or an export of safetensors"
)


class InitSource(NamedTuple):
  """One opened checkpoint.

  Attributes:
    name: path of the checkpoint.
    arrays: path -> shape and dtype of every parameter, by the names of this code.
    read: function from shapes, dtypes and shardings by path to arrays.
    tokenizer: fingerprint of the tokenizer of its run; None if the checkpoint does not include it.
    notes: remarks for the report.
    imported: origin, licence and citation of the import that the parameters come from, or None.
  """

  name: str
  arrays: Mapping[str, jax.ShapeDtypeStruct]
  read: Read
  tokenizer: str | None
  notes: tuple[str, ...] = ()
  imported: Mapping[str, Any] | None = None


def open_source(path: epath.PathLike, step: int | None = None, part: Part = "params") -> InitSource:
  """Open a checkpoint of this or of the released code.

  Args:
    path: workdir, its folder of checkpoints, or one checkpoint; local or gs://.
    step: step of the checkpoint; the newest by default.
    part: trained parameters or their average.

  Returns:
    The source; parameters of the released code are in host memory.

  Raises:
    CheckpointError: there is no intact checkpoint.
    ValueError: the checkpoint contains another model, or lacks the part.
  """
  root = absolute_path(path)
  try:
    exists = root.exists()
  except Exception as error:  # of any library that reads the bucket
    what = " ".join(str(error).split())
    raise CheckpointError(
      f"{root} cannot be opened: {what}; check the network, and that the credentials "
      "of this machine may read it"
    ) from error
  if not exists:
    raise CheckpointError(f"{root}: the folder does not exist; {_EXPECTED}")
  if not root.is_dir():
    raise CheckpointError(f"{root} is a file; {_EXPECTED}")
  if (root / "model.safetensors").is_file() and "://" not in str(root):
    return _in_memory(str(root), torch_module.read(str(root)), part, "an export")
  if _is_own(root) or not _is_published(root):
    return _open_own(root, step, part)
  return _open_published(root, step, part)


def _is_own(root: epath.Path) -> bool:
  folder = root / "checkpoints"
  return (root / "state").is_dir() or (
    folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())
  )


def _is_published(root: epath.Path) -> bool:
  names = ("jax_orbax_weight", "checkpoint.npz", "default", "_METADATA")
  return any((root / name).exists() for name in names) or any(
    child.name.isdigit() and (child / "default").is_dir() for child in root.iterdir()
  )


def _open_own(root: epath.Path, step: int | None, part: Part) -> InitSource:
  checkpoint = find_checkpoint(root, step)
  saved = saved_arrays(checkpoint)
  arrays = {p.removeprefix(f"{part}/"): a for p, a in saved.items() if p.startswith(f"{part}/")}
  metadata = read_metadata(checkpoint)
  if not arrays:
    parts = sorted({path.split("/")[0] for path in saved})
    raise ValueError(f"{checkpoint} holds no {part!r}; it holds {', '.join(parts)}.")

  def read(targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return flatten_paths(restore_params(checkpoint, unflatten(targets), part))

  adapted = any(path.startswith(_ADAPTERS) for path in arrays)
  notes = ("its adapters are merged",) if adapted else ()
  arrays = {path: array for path, array in arrays.items() if not path.startswith(_ADAPTERS)}
  return InitSource(
    str(checkpoint), arrays, read, metadata.get("tokenizer"), notes, metadata.get("imported")
  )


def restore_params(checkpoint: epath.Path, abstract: Any, part: str) -> Any:
  """Restore parameters of a model, with the adapters of the run merged.

  Args:
    checkpoint: directory returned by `find_checkpoint`.
    abstract: nested dict of ShapeDtypeStructs with their target shardings, of any parameters.
    part: "params" or "ema".

  Raises:
    CheckpointError: an array is missing or cannot be read.
  """
  lora = (read_metadata(checkpoint).get("config") or {}).get("lora", {})
  wanted = flatten_paths(abstract)
  prefix = f"{part}/{_ADAPTERS}"
  adapters = {}
  for path, array in saved_arrays(checkpoint).items():
    kernel = wanted.get(path.removeprefix(prefix).rpartition("/")[0])
    if path.startswith(prefix) and kernel is not None:
      adapters[path.removeprefix(f"{part}/")] = jax.ShapeDtypeStruct(
        array.shape, array.dtype, sharding=_replicated(kernel.sharding)
      )
  tree = {part: unflatten({**wanted, **adapters})}
  params = restore_arrays(checkpoint, tree, partial=True)[part]
  if not adapters:
    return params
  config = ov_models.LoraConfig(rank=lora["rank"], alpha=lora["alpha"])
  merge = functools.partial(ov_models.merge_adapters, config)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(merge, out_shardings=shardings)(params)


def _open_published(root: epath.Path, step: int | None, part: Part) -> InitSource:
  folder = root if "://" in str(root) else Path(str(root))
  try:
    # Kernels that are not split by heads do not depend on the number of heads.
    found = orbax_folder.read(folder, step=step, num_heads=1)
  except FileNotFoundError as error:
    raise CheckpointError(f"{error} {_EXPECTED}") from error
  name = str(orbax_folder.find(folder, step))
  return _in_memory(name, found, part, "a checkpoint of the published code")


def _replicated(sharding: Any) -> Any:
  """Return the sharding of a small array next to one with this sharding."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


def _in_memory(name: str, found: Imported, part: Part, note: str) -> InitSource:
  """Return a source with parameters in host memory."""
  if part != "params":
    raise ValueError(f"{name} is {note} and holds no {part!r}; set the part to params.")
  params: Any = found.params
  if isinstance(found.config, ov_models.ViTConfig):
    params = {"encoder": params}
  elif isinstance(found.config, ov_models.TextConfig):
    params = {"text": params}
  flat: dict[str, np.ndarray] = flatten_paths(params)

  def read(targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    def place(path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
      array = flat[path]
      if target.sharding is None:
        return jax.device_put(array)
      return jax.make_array_from_callback(array.shape, target.sharding, lambda index: array[index])

    return {path: place(path, target) for path, target in targets.items()}

  arrays = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in flat.items()}
  return InitSource(name, arrays, read, None, (note, *found.notes))
