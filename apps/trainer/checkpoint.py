"""Checkpoints of a run with Orbax: asynchronous, atomic, verified, restorable on any mesh.

  with Checkpoints(workdir / "checkpoints", keep_last=2, keep_every=10_000) as checkpoints:
    if (step := checkpoints.latest_step()) is not None:
      state, metadata = checkpoints.restore(abstract_state)     # abstract leaves carry shardings
    ...
    checkpoints.save(step, state, {"stage": ..., "data": loader.state(), "config": ...})

One checkpoint is a directory `<directory>/<step>/`:

  state/          the train state as OCDBT arrays, restored bit for bit
  metadata/       one JSON file: the metadata given to `save`, step, format and library versions
  manifest.json   size and checksum of every file, written before the directory gets its final name

`save` copies the state to the host and writes it in the background to a temporary name, which is
renamed when the checkpoint is complete (on gs:// a marker file is written last). An interrupted
save therefore leaves a temporary directory, never a partial checkpoint. Before the rename the files
are read back: the list of arrays and the metadata must match what was saved. Later damage (deleted,
truncated or changed files) is detected by the manifest: the damaged step is renamed to
`damaged-<step>` with a warning, and the previous one is used.

In a multi-host run all processes make the same calls and see the same directory (a shared file
system or gs://); process 0 writes the JSON and verifies the directories.
"""

import importlib.metadata
import json
import logging as python_logging
import os
import platform
import re
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp
import tensorstore

from apps.trainer import checkpoint_manifest, checkpoint_upgrade
from apps.trainer.checkpoint_fit import check_restorable, saved_arrays, saved_tree
from apps.trainer.checkpoint_folder import (
  absolute_path,
  check_path,
  delete,
  find_checkpoint,
  move_damaged_aside,
  remove_unfinished,
  saved_checkpoint,
  steps_in,
)
from apps.trainer.checkpoint_metadata import FORMAT, CheckpointError, read_metadata
from apps.trainer.errors import one_line
from apps.trainer.paths import flatten_paths
from apps.trainer.state import TrainState

__all__ = [
  "CheckpointError",
  "Checkpoints",
  "Restored",
  "absolute_path",
  "check_restorable",
  "find_checkpoint",
  "library_versions",
  "read_metadata",
  "restore_arrays",
  "saved_arrays",
  "saved_checkpoint",
]

PyTree = Any

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Restored(NamedTuple):
  """State, sharded as the abstract state, and the metadata saved with it."""

  state: TrainState
  metadata: dict[str, Any]


class Checkpoints:
  """Checkpoints of one run in one directory; a context manager that waits for the last save.

  Opening it removes the files of interrupted saves and renames damaged checkpoints. It lists and
  deletes steps itself, because `ocp.CheckpointManager` needs google-cloud-storage for buckets.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int | None = None,
    read_only: bool = False,
  ) -> None:
    """Open or create `directory`, local or gs://.

    Args:
      directory: directory for the checkpoints of one run.
      keep_last: number of newest checkpoints to keep, at least 1.
      keep_every: also keep checkpoints whose step is a multiple of this number; None disables it.
      read_only: do not change `directory`, where another process may be saving.

    Raises:
      ValueError: `keep_last` or `keep_every` is less than 1.
      CheckpointError: no checkpoint in `directory` can be restored.
    """
    if keep_last < 1:
      raise ValueError(f"keep_last={keep_last} must be at least 1, or nothing can be resumed.")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"keep_every={keep_every} must be at least 1 step, or None.")
    check_path(directory)
    self.directory = absolute_path(directory)
    self._keep_last, self._keep_every = keep_last, keep_every
    self._saving: int | None = None
    self._record: dict[str, Any] = {}
    self._arrays: dict[str, tuple[Any, Any]] = {}
    self._failures = 0
    logging.get_absl_logger().addFilter(_quiet)
    if jax.process_index() == 0 and not read_only:
      try:
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.directory)
        move_damaged_aside(self.directory)
      except OSError as error:
        raise CheckpointError(f"{self.directory} cannot be prepared: {_cause(error)}") from error
    _barrier("checkpoints opened")
    self._steps = steps_in(self.directory)
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler("state", "metadata"),
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._verify,
        # If a background thread fails to create a directory, other threads wait five minutes for
        # it. Buckets have no directories to create.
        create_directories_asynchronously="://" in str(self.directory),
      ),
    )

  def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> bool:
    """Start saving; return once the state is copied, so that it can be donated to the next step.

    Waits for the previous save.

    Args:
      step: number of completed updates, equal to state["step"].
      metadata: JSON values, such as loader state, resolved config, data fingerprint and stage.

    Returns:
      False if this step is already saved.

    Raises:
      CheckpointError: this save cannot start, or the previous one failed in the background.
      ValueError: metadata contains values that are not JSON.
    """
    record = {**metadata, "step": step, "format": FORMAT, "versions": library_versions()}
    try:
      text = json.dumps(record)
    except TypeError as error:
      raise ValueError(f"checkpoint metadata must be JSON values: {error}.") from error
    self.wait()
    if step in self._steps:
      return False
    self._saving, self._record = step, json.loads(text)
    self._arrays = {path: (x.shape, x.dtype) for path, x in flatten_paths(state).items()}
    try:
      self._checkpointer.save(
        self.directory / str(step),
        ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(record)),
      )
    except Exception as error:
      raise self._failed(error) from error
    self._steps = sorted([*self._steps, step])
    return True

  def latest_step(self) -> int | None:
    """Return the newest step that is saved or being saved; None if there is none."""
    return max(self._steps, default=None)

  def finished_step(self) -> int | None:
    """Return the newest step with a complete checkpoint in the directory. Thread-safe."""
    return max(steps_in(self.directory), default=None)

  def restore(self, abstract_state: TrainState, step: int | None = None) -> Restored:
    """Restore a checkpoint with the shardings of `abstract_state`.

    Args:
      abstract_state: ShapeDtypeStructs with shardings of any mesh, see `state.with_shardings`.
      step: step of a checkpoint in the directory; the newest by default.

    Raises:
      CheckpointError: there is no checkpoint, or its arrays differ from the abstract state in path,
        shape or dtype; the message lists the differences.
    """
    self.wait()
    path = find_checkpoint(self.directory, step)
    return Restored(restore_arrays(path, abstract_state), read_metadata(path))

  def wait(self) -> None:
    """Wait for the running save and delete old checkpoints; raise CheckpointError if it failed."""
    try:
      self._checkpointer.wait_until_finished()
    except Exception as error:
      raise self._failed(error) from error
    if self._saving in self._steps:  # a restore alone deletes nothing
      self._delete_old()

  def close(self) -> None:
    """Wait for the running save and stop the background threads."""
    try:
      self.wait()
    finally:
      self._checkpointer.close()
      if self._failures and jax.process_index() == 0:
        self._free_space()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
    try:
      self.close()
    except CheckpointError as error:
      if kind is None:
        raise
      logging.error("%s", error)  # the original exception is the one to raise

  def _delete_old(self) -> None:
    """Delete the checkpoints outside the retention policy."""
    kept = set(self._steps[-self._keep_last :])
    if self._keep_every is not None:
      kept.update(step for step in self._steps if step % self._keep_every == 0)
    if jax.process_index() == 0:
      for step in set(self._steps) - kept:
        delete(self.directory / str(step))
    self._steps = sorted(kept)

  def _failed(self, error: Exception) -> CheckpointError:
    self._failures += 1
    self._steps = [step for step in self._steps if step != self._saving]
    try:
      newest = self.finished_step()
    except OSError:
      newest = None
    last = "(none)" if newest is None else f"of step {newest}"
    return CheckpointError(
      f"saving step {self._saving} to {self.directory} failed: {_cause(error)}. The newest "
      f"complete checkpoint is {last}; make space or correct the permissions there, and the same "
      "command resumes from it"
    )

  def _free_space(self) -> None:
    """Remove the files of failed saves, so that a full disk has space for the other files."""
    try:
      remove_unfinished(self.directory)
    except OSError as error:
      logging.warning("%s: unfinished checkpoints stay: %s", self.directory, _cause(error))

  def _verify(self) -> None:
    """Read the files back; called in the background before the directory gets its final name."""
    if jax.process_index() == 0:
      (written,) = (
        p for p in self.directory.iterdir() if p.name.split(".")[0] == str(self._saving)
      )
      _check_written(written, self._arrays, self._record)
      checkpoint_manifest.write(written)


def restore_arrays(checkpoint: epath.Path, abstract: PyTree, *, partial: bool = False) -> PyTree:
  """Restore arrays of a checkpoint directory into the tree of `abstract`.

  Args:
    checkpoint: directory returned by `find_checkpoint`.
    abstract: ShapeDtypeStructs with the target shardings.
    partial: allow arrays in the checkpoint that `abstract` lacks; every array of `abstract` must
      exist in either case.

  Raises:
    CheckpointError: as in `check_restorable`, or an array cannot be read.
  """
  check_restorable(checkpoint, abstract, partial=partial)
  saved = saved_tree(checkpoint)
  indexed = checkpoint_upgrade.is_indexed(saved)
  target = checkpoint_upgrade.to_indexed(abstract, saved) if indexed else abstract
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  try:
    restored = reader.restore(
      checkpoint / "state",
      args=ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=partial),
    )
  except (ValueError, OSError, LookupError) as error:  # TensorStore: missing or damaged files
    raise CheckpointError(
      f"{checkpoint} cannot be restored: {one_line(error, 300)}; use an older checkpoint, or a copy"
    ) from error
  return checkpoint_upgrade.to_named(restored) if indexed else restored


def library_versions() -> dict[str, str]:
  """Return the versions of Python and of the libraries that checkpoints and numerics depend on."""
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  return {"python": platform.python_version(), **versions}


def _check_written(
  checkpoint: epath.Path, arrays: dict[str, tuple[Any, Any]], record: dict[str, Any]
) -> None:
  """Raise CheckpointError unless a complete checkpoint can be read back as saved.

  Array data are not read, only the index: Orbax restores nothing without the merged index
  `manifest.ocdbt`, or with an index that lacks arrays.
  """
  for name in checkpoint_manifest.REQUIRED:
    if not (checkpoint / name).exists():
      raise CheckpointError(f"{name} was not written, without which nothing can be restored")
  if read_metadata(checkpoint) != record:
    raise CheckpointError("the metadata read back differ from those that were saved")
  found = {path: (x.shape, x.dtype) for path, x in saved_arrays(checkpoint).items()}
  if found != arrays:
    raise CheckpointError(f"{len(found)} arrays were written in place of {len(arrays)}")
  store = tensorstore.KvStore.open({"driver": "ocdbt", "base": _key_value_spec(checkpoint)})
  indexed = {key.rpartition(b"/")[0] for key in store.result().list().result()}
  if len(indexed) != len(arrays):
    raise CheckpointError(f"the index holds {len(indexed)} of {len(arrays)} arrays")


def _key_value_spec(checkpoint: epath.Path) -> dict[str, str]:
  """Return the TensorStore key-value store spec of the state of a checkpoint."""
  scheme, separator, rest = str(checkpoint).partition("://")
  if not separator:
    return {"driver": "file", "path": f"{checkpoint}/state/"}
  bucket, _, folder = rest.partition("/")
  return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{folder}/state/"}


def _cause(error: BaseException) -> str:
  """Return a short reason for a failed write, from the operating system where possible."""
  if found := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(found[1]))
  if isinstance(error, OSError) and error.strerror:
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  return one_line(error, 300)


def _quiet(record: python_logging.LogRecord) -> bool:
  """Drop tracebacks that Orbax logs in each of its threads; `_failed` reports the cause once.

  Also drop the warnings of Orbax that a directory is read-only.
  """
  from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  noise = record.exc_info or re.search("read.only", str(record.msg))
  return not (from_orbax and noise and os.environ.get("OV_TRACEBACK") != "1")


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
