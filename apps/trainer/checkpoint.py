"""Checkpoints of a run with orbax: asynchronous, atomic, verified, restorable on any mesh.

  with Checkpoints(workdir / "checkpoints", keep_last=2, keep_every=10_000) as checkpoints:
    if (step := checkpoints.latest_step()) is not None:
      state, metadata = checkpoints.restore(abstract_state)     # abstract leaves carry shardings
    ...
    checkpoints.save(step, state, {"stage": ..., "data": loader.state(), "config": ...})

One checkpoint is a directory `<directory>/<step>/`:

  state/          the train state: OCDBT arrays, bit for bit
  metadata/       one JSON file: what `save` was given, plus step, format and library versions
  manifest.json   size and checksum of every file, written before the directory gets its final name

A save first copies the state to the host, then writes in the background to a temporary name that is
renamed when complete (on gs:// a marker file is written last), so a killed run leaves a temporary
directory and no half checkpoint. Before that, still in the background, the files are read back: the
list of arrays and the metadata must be those that were saved. What is damaged afterwards (deleted,
cut or changed files) differs from the manifest: such a step is moved aside as `damaged-<step>`,
with a warning, and the one before it is used.

Every process of a multi-host run makes the same calls; all see the same directory (a shared file
system or gs://); process 0 writes the JSON and judges the directories.
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
from orbax.checkpoint._src.path import gcs_utils
import tensorstore

from apps.trainer import checkpoint_manifest, checkpoint_upgrade
from apps.trainer.checkpoint_fit import check_restorable, saved_arrays, saved_tree
from apps.trainer.checkpoint_folder import (
  absolute_path,
  check_path,
  find_checkpoint,
  remove_unfinished,
  saved_checkpoint,
  set_damaged_aside,
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

# Orbax asks a client of Google, which it does not bring, whether folders of a bucket are things of
# their own. Nothing here depends on it; where they are, deleted checkpoints leave empty ones.
gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


class Restored(NamedTuple):
  """State on the devices of the abstract state's shardings, and the metadata saved with it."""

  state: TrainState
  metadata: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run in one directory; a context manager that waits for the last save.

  Opening it removes what a killed save left behind and moves damaged checkpoints aside.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int | None = None,
    read_only: bool = False,
  ) -> None:
    """Opens or creates `directory`, local or gs://.

    Args:
      directory: of the checkpoints of one run.
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_every: also keep every checkpoint whose step is a multiple of this; None for no others.
      read_only: change nothing in `directory`, where another program may be saving.

    Raises:
      ValueError: a number that keeps nothing.
      CheckpointError: nothing that is saved in `directory` could be restored.
    """
    if keep_last < 1:
      raise ValueError(f"keep_last={keep_last} must be at least 1, or nothing can be resumed.")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"keep_every={keep_every} must be at least 1 step, or None.")
    check_path(directory)
    self.directory = absolute_path(directory)
    self._saving: int | None = None
    self._record: dict[str, Any] = {}
    self._arrays: dict[str, tuple[Any, Any]] = {}
    self._failures = 0
    logging.get_absl_logger().addFilter(_quiet)
    if jax.process_index() == 0 and not read_only:
      try:
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.directory)
        set_damaged_aside(self.directory)
      except OSError as error:
        raise CheckpointError(f"{self.directory} cannot be prepared: {_cause(error)}") from error
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
        read_only=read_only,
        create=False,  # made above
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._verify,
          # Made in the background, a folder that cannot be made fails one thread, and others wait
          # five minutes for it. In a bucket there is nothing to make.
          create_directories_asynchronously="://" in str(self.directory),
        ),
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
      text = json.dumps(record)
    except TypeError as error:
      raise ValueError(f"checkpoint metadata must be JSON values: {error}.") from error
    self.wait()
    if step in self._manager.all_steps():
      return False
    self._saving, self._record = step, json.loads(text)
    self._arrays = {path: (x.shape, x.dtype) for path, x in flatten_paths(state).items()}
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
    return max(steps_in(self.directory), default=None)

  def restore(self, abstract_state: TrainState, step: int | None = None) -> Restored:
    """Reads a checkpoint, by default the newest, onto the devices of `abstract_state`'s shardings.

    Args:
      abstract_state: ShapeDtypeStructs with shardings, see `state.with_shardings`; of any mesh.
      step: one of `all_steps()`.

    Raises:
      CheckpointError: if there is none, or its arrays differ from the abstract state in path,
        shape or dtype; the message names the differences.
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
      logging.error("%s", error)  # what ended the run before is the cause to show

  def _failed(self, error: Exception) -> CheckpointError:
    self._failures += 1
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
    """Remove what failed saves left, so that a full disk has room for the run's other files."""
    try:
      remove_unfinished(self.directory)
    except OSError as error:
      logging.warning("%s: unfinished checkpoints stay: %s", self.directory, _cause(error))

  def _verify(self) -> None:
    """Read the files back; runs in the background before the directory gets its final name."""
    if jax.process_index() == 0:
      (written,) = (
        p for p in self.directory.iterdir() if p.name.split(".")[0] == str(self._saving)
      )
      _check_written(written, self._arrays, self._record)
      checkpoint_manifest.write(written)


def restore_arrays(checkpoint: epath.Path, abstract: PyTree, *, partial: bool = False) -> PyTree:
  """Reads arrays of a checkpoint directory into the tree of `abstract`.

  Args:
    checkpoint: of `find_checkpoint`.
    abstract: ShapeDtypeStructs, with shardings for where they shall live.
    partial: whether the checkpoint may hold more than `abstract`; what is asked for must be there
      either way.

  Raises:
    CheckpointError: as `check_restorable`, or an array cannot be read.
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
  except (ValueError, OSError, LookupError) as error:  # of TensorStore: files damaged or gone
    raise CheckpointError(
      f"{checkpoint} cannot be restored: {one_line(error, 300)}; use an older checkpoint, or a copy"
    ) from error
  return checkpoint_upgrade.to_named(restored) if indexed else restored


def library_versions() -> dict[str, str]:
  """Versions of Python and of the libraries a checkpoint or its arithmetic depends on."""
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  return {"python": platform.python_version(), **versions}


def _check_written(
  checkpoint: epath.Path, arrays: dict[str, tuple[Any, Any]], record: dict[str, Any]
) -> None:
  """Raise CheckpointError unless a complete checkpoint reads back as it was saved.

  The content of arrays is not read, only what leads to it: without the merged index
  `manifest.ocdbt`, or with an index that lacks arrays, orbax restores nothing.
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
  """The state of a checkpoint as a TensorStore key-value store."""
  scheme, separator, rest = str(checkpoint).partition("://")
  if not separator:
    return {"driver": "file", "path": f"{checkpoint}/state/"}
  bucket, _, folder = rest.partition("/")
  return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{folder}/state/"}


def _cause(error: BaseException) -> str:
  """Why a file could not be written, in a few words where the operating system says it."""
  if found := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(found[1]))
  if isinstance(error, OSError) and error.strerror:
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  return one_line(error, 300)


def _quiet(record: python_logging.LogRecord) -> bool:
  """Drop tracebacks that orbax logs in each of its threads; `_failed` reports the cause once.

  Dropped too: its warnings that a directory opened for reading is read only.
  """
  from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  noise = record.exc_info or re.search("read.only", str(record.msg))
  return not (from_orbax and noise and os.environ.get("OV_TRACEBACK") != "1")


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
