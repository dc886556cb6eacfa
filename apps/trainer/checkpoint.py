"""Checkpoints of a run with orbax: asynchronous, atomic, restorable on any mesh.

  with Checkpoints(workdir / "checkpoints", keep_last=2, keep_every=10_000) as checkpoints:
    if (step := checkpoints.latest_step()) is not None:
      state, metadata = checkpoints.restore(abstract_state)     # abstract leaves carry shardings
    ...
    checkpoints.save(step, state, {"stage": ..., "data": loader.state(), "config": ...})

One checkpoint is a directory `<directory>/<step>/`:

  state/          the train state: OCDBT arrays, bit for bit
  metadata/       one JSON file: what `save` was given, plus step, format and library versions
  manifest.json   path and size of every file, written before the directory gets its final name

A save first copies the state to the host, then writes in the background to a temporary name that is
renamed when complete (on gs:// a marker file is written last), so a killed run leaves a temporary
directory and no half checkpoint. What is lost afterwards (deleted or cut files) shows against the
manifest: such a step is moved aside as `damaged-<step>`, with a warning, and the one before it is
used.

Every process of a multi-host run makes the same calls; all see the same directory (a shared file
system or gs://); process 0 writes the JSON and judges the directories.
"""

import concurrent.futures
import importlib.metadata
import json
import platform
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import gcs_utils

from apps.trainer.optimizer import flatten_paths
from apps.trainer.state import TrainState

PyTree = Any

FORMAT = 1  # of the metadata and the directory; raise it with a breaking change
MANIFEST = "manifest.json"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# Orbax asks a client of Google, which it does not bring, whether folders of a bucket are things of
# their own. Nothing here depends on it; where they are, deleted checkpoints leave empty ones.
gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


class CheckpointError(OSError):
  """A checkpoint cannot be written, found or restored; the message says which and what to do."""


class Restored(NamedTuple):
  """State on the devices of the abstract state's shardings, and the metadata saved with it."""

  state: TrainState
  metadata: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run in one directory; a context manager that waits for the last save.

  Opening it removes what a killed save left behind and moves damaged checkpoints aside.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep_last: int = 2, keep_every: int | None = None
  ) -> None:
    """Opens or creates `directory`, local or gs://.

    Args:
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_every: also keep every checkpoint whose step is a multiple of this; None for no others.
    """
    if keep_last < 1:
      raise ValueError(f"keep_last={keep_last} must be at least 1, or nothing can be resumed.")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"keep_every={keep_every} must be at least 1 step, or None.")
    self.directory = absolute_path(directory)
    self._saving: int | None = None
    if jax.process_index() == 0:
      self.directory.mkdir(parents=True, exist_ok=True)
      _remove_unfinished(self.directory)
      _set_damaged_aside(self.directory)
    _barrier("checkpoints opened")
    policies = ocp.checkpoint_managers
    keep: list[Any] = [policies.LatestN(keep_last)]
    if keep_every is not None:
      keep.append(policies.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_names=("state", "metadata"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
      ),
    )

  def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> bool:
    """Starts saving; returns once the state is copied, so it may be donated to the next step.

    Waits for the save before it, if that still runs.

    Args:
      step: number of finished updates, as in state["step"].
      metadata: JSON values: loader state, resolved config, data fingerprint, stage, ...

    Returns:
      False if this step is saved already and nothing is done.

    Raises:
      CheckpointError: if this save cannot start, or the one before it failed in the background.
      ValueError: if metadata is not JSON.
    """
    record = {**metadata, "step": step, "format": FORMAT, "versions": library_versions()}
    try:
      json.dumps(record)
    except TypeError as error:
      raise ValueError(f"checkpoint metadata must be JSON values: {error}.") from error
    self.wait()
    if step in self._manager.all_steps():
      return False
    self._saving = step
    try:
      return self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(record)
        ),
        force=True,
      )
    except Exception as error:
      raise self._failed(error) from error

  def latest_step(self) -> int | None:
    """The newest step that is saved (or being saved), None in an empty directory."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Steps kept, oldest first."""
    return sorted(self._manager.all_steps())

  def finished_step(self) -> int | None:
    """The newest step whose save is complete, as the directory says; for any thread."""
    return max(_steps(self.directory), default=None)

  def restore(self, abstract_state: TrainState, step: int | None = None) -> Restored:
    """Reads a checkpoint, by default the newest, onto the devices of `abstract_state`'s shardings.

    Args:
      abstract_state: ShapeDtypeStructs with shardings, see `state.with_shardings`; of any mesh.
      step: one of `all_steps()`.

    Raises:
      CheckpointError: if there is none, or its arrays differ from the abstract state in path,
        shape or dtype; the message lists the differences.
    """
    self.wait()
    path = find_checkpoint(self.directory, step)
    return Restored(restore_arrays(path, abstract_state), read_metadata(path))

  def check(self) -> None:
    """Raises CheckpointError if a save failed in the background; does not wait."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error

  def wait(self) -> None:
    """Returns when the running save is complete; raises CheckpointError if it failed."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error

  def close(self) -> None:
    """Waits for the running save and ends the background threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def _failed(self, error: Exception) -> CheckpointError:
    return CheckpointError(
      f"saving step {self._saving} to {self.directory} failed: {type(error).__name__}: {error}. "
      "Check free space and permissions there; older checkpoints are untouched."
    )

  def _write_manifest(self) -> None:
    """Runs in the background when all files are written, before the directory gets its name."""
    if jax.process_index() == 0:
      (written,) = (
        p for p in self.directory.iterdir() if p.name.split(".")[0] == str(self._saving)
      )
      (written / MANIFEST).write_text(json.dumps(_file_sizes(written), indent=0))


def find_checkpoint(path: epath.PathLike, step: int | None = None) -> epath.Path:
  """The directory of one intact checkpoint; reads only.

  Args:
    path: of a run (with `checkpoints/` in it), of its checkpoints, or of one checkpoint.
    step: which, if there are several; by default the newest intact one, with a warning for each
      damaged one passed over.

  Raises:
    CheckpointError: if there is none, or the one asked for is missing or damaged.
  """
  root = absolute_path(path)
  if (root / "checkpoints").is_dir():
    root = root / "checkpoints"
  single = (root / "state").is_dir()
  steps = [int(root.name)] if single and root.name.isdigit() else _steps(root)
  by_step = {s: root if single else root / str(s) for s in steps}
  if step is not None and step not in by_step:
    raise CheckpointError(f"no checkpoint of step {step} in {root}; there are {sorted(by_step)}.")
  wanted = by_step if step is None else {step: by_step[step]}

  found = -1
  if jax.process_index() == 0:
    for s in sorted(wanted, reverse=True):
      if (fault := _fault(wanted[s])) is None:
        found = s
        break
      logging.warning("Checkpoint %s is damaged and passed over: %s.", wanted[s], fault)
  found = int(multihost_utils.broadcast_one_to_all(found))  # all processes take the same one
  if found < 0:
    what = f"of step {step} " if step is not None else ""
    raise CheckpointError(
      f"no intact checkpoint {what}in {root} ({len(wanted)} looked at); expected a run's workdir, "
      "its checkpoints directory or one step of it."
    )
  return by_step[found]


def saved_checkpoint(directory: epath.PathLike, step: int | None = None) -> epath.Path | None:
  """Return the checkpoint that a run in `directory` resumes from; reads only.

  Args:
    directory: of the checkpoints of a run; need not exist.
    step: which one; the newest intact one by default.

  Raises:
    CheckpointError: the one asked for is missing or damaged.
  """
  root = absolute_path(directory)
  steps = _steps(root)
  if step is not None and step not in steps:
    raise CheckpointError(
      f"config.eval.checkpoint_step={step}: {root} holds the steps "
      f"{', '.join(map(str, steps)) or '(none)'}; config.checkpoint.keep_last and keep_every say "
      "which a run keeps"
    )
  if step is not None or any(_fault(root / str(s)) is None for s in reversed(steps)):
    return find_checkpoint(root, step)
  return None


def read_metadata(checkpoint: epath.Path) -> dict[str, Any]:
  """The JSON saved with a checkpoint directory of `find_checkpoint`.

  Raises:
    CheckpointError: if it was written in a newer format.
  """
  metadata = json.loads((checkpoint / "metadata" / "metadata").read_text())
  if metadata["format"] > FORMAT:
    raise CheckpointError(
      f"{checkpoint} has format {metadata['format']}, this code reads up to {FORMAT}; "
      f"use the code that wrote it (library versions {metadata['versions']})."
    )
  return metadata


def saved_arrays(checkpoint: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Path -> shape and dtype of every array in a checkpoint, e.g. `params/encoder/cls`."""
  handler = ocp.PyTreeCheckpointHandler()
  leaves = flatten_paths(handler.metadata(checkpoint / "state").tree)
  return {path: jax.ShapeDtypeStruct(m.shape, m.dtype) for path, m in leaves.items()}


def restore_arrays(checkpoint: epath.Path, abstract: PyTree, *, partial: bool = False) -> PyTree:
  """Reads arrays of a checkpoint directory into the tree of `abstract`.

  Args:
    abstract: ShapeDtypeStructs, with shardings for where they shall live.
    partial: whether the checkpoint may hold more than `abstract`; what is asked for must be there
      either way.

  Raises:
    CheckpointError: as `check_restorable`.
  """
  check_restorable(checkpoint, abstract, partial=partial)
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return reader.restore(
    checkpoint / "state",
    args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial),
  )


def check_restorable(checkpoint: epath.Path, abstract: PyTree, *, partial: bool = False) -> None:
  """Compare a checkpoint directory with the tree that `restore_arrays` would read; reads no array.

  Args:
    checkpoint: of `find_checkpoint`.
    abstract: ShapeDtypeStructs.
    partial: see `restore_arrays`.

  Raises:
    CheckpointError: listing every path that is missing, unexpected, or of other shape or dtype.
  """
  differences = _differences(saved_arrays(checkpoint), flatten_paths(abstract), partial)
  if differences and all(line.startswith("opt/") for line in differences):
    raise CheckpointError(
      f"{checkpoint} holds another optimizer state than this run would, in {len(differences)} "
      f"arrays, such as {differences[0]}. Keep config.optimizer.mu_dtype, second_moment and frozen "
      "as they were (saved in its metadata), choose another workdir, or take over the parameters "
      "only with init_from."
    )
  if differences:
    shown = "\n  ".join(differences[:20] + ["..."] * (len(differences) > 20))
    raise CheckpointError(
      f"{checkpoint} does not fit this run in {len(differences)} arrays:\n  {shown}\n"
      "Resume with the config it was trained with (saved in its metadata), choose another workdir, "
      "or take over the parameters only with init_from."
    )


def library_versions() -> dict[str, str]:
  """Versions of Python and of the libraries a checkpoint or its arithmetic depends on."""
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  return {"python": platform.python_version(), **versions}


def absolute_path(path: epath.PathLike) -> epath.Path:
  """An absolute local path, or the URL (gs://...) as it is."""
  path = epath.Path(path).expanduser()
  return path if "://" in str(path) else path.absolute()


def _differences(saved: dict[str, Any], wanted: dict[str, Any], partial: bool) -> list[str]:
  def text(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"

  lines = [f"{p}: missing, expected {text(leaf)}" for p, leaf in wanted.items() if p not in saved]
  lines += [
    f"{p}: saved {text(saved[p])}, expected {text(leaf)}"
    for p, leaf in wanted.items()
    if p in saved and (saved[p].shape, saved[p].dtype) != (leaf.shape, leaf.dtype)
  ]
  if not partial:
    lines += [
      f"{p}: saved {text(leaf)}, not expected" for p, leaf in saved.items() if p not in wanted
    ]
  return lines


def _steps(directory: epath.Path) -> list[int]:
  """Steps with a finished save, oldest first."""
  if not directory.is_dir():
    return []
  numbered = [p for p in directory.iterdir() if p.name.isdigit()]
  return sorted(int(p.name) for p in numbered if ocp.utils.is_checkpoint_finalized(p))


def _fault(checkpoint: epath.Path) -> str | None:
  """What is wrong with a checkpoint directory, None if nothing is."""
  if not (checkpoint / MANIFEST).exists():
    return f"{MANIFEST} is missing"
  try:
    expected = json.loads((checkpoint / MANIFEST).read_text())
  except ValueError:
    return f"{MANIFEST} is not JSON"
  found = _file_sizes(checkpoint)
  for name, size in expected.items():
    if name not in found:
      return f"{name} is missing"
    if found[name] != size:
      return f"{name} has {found[name]} bytes instead of {size}"
  return None


def _file_sizes(checkpoint: epath.Path) -> dict[str, int]:
  """Size in bytes of each file below the two items, by relative path."""
  files = [
    folder / name
    for item in ("state", "metadata")
    for folder, _, names in (checkpoint / item).walk()
    for name in names
  ]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # stat is a request each on gs://
    sizes = pool.map(lambda p: p.stat().length, files)
    return {str(p.relative_to(checkpoint)): s for p, s in zip(files, sizes, strict=True)}


def _remove_unfinished(directory: epath.Path) -> None:
  """Removes what killed saves left. Orbax would do it in a thread that can outlive the program."""
  for path in directory.iterdir():
    if path.is_dir() and ocp.path.step.TMP_DIR_SUFFIX in path.name:
      path.rmtree()


def _set_damaged_aside(directory: epath.Path) -> None:
  """Renames damaged checkpoints newer than the newest intact one, so that training can go on."""
  for step in reversed(_steps(directory)):
    path = directory / str(step)
    if (fault := _fault(path)) is None:
      return
    aside = directory / f"damaged-{step}"
    logging.warning("Checkpoint %s is damaged: %s. Moved to %s.", path, fault, aside)
    if aside.exists():
      aside.rmtree()
    path.rename(aside)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
