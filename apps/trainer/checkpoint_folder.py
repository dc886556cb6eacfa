"""Checkpoint directories of a run: lists them, verifies them and finds one to restore.

Only process 0 verifies checkpoints; all processes then use the same one.
"""

from collections.abc import Mapping
import itertools
import re

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp
import tensorstore

from apps.trainer import checkpoint_manifest
from apps.trainer.checkpoint_metadata import CheckpointError, read_metadata


def absolute_path(path: epath.PathLike) -> epath.Path:
  """Return an absolute local path; URLs (gs://...) are returned unchanged."""
  path = epath.Path(path).expanduser()
  return path if "://" in str(path) else path.absolute()


def check_path(path: epath.PathLike, setting: str = "") -> None:
  """Check that checkpoints in a directory can be written and read back.

  Orbax finds its files with glob patterns made from the path, so checkpoints below a path with
  wildcards are written but never found. TensorStore rejects some names.

  Args:
    path: directory of a run or of checkpoints; need not exist.
    setting: name of the setting for the message, such as "--workdir=".

  Raises:
    CheckpointError: the path contains unsupported characters.
  """
  whole = str(absolute_path(path))
  given = ascii(setting + str(path))[1:-1]  # printable for any path
  if found := re.search(r"[*?[\\]", whole):
    raise CheckpointError(
      f"{given}: {found[0]} is a wildcard or escape of file patterns, and checkpoints in such a "
      "folder cannot be restored; choose a path without any of * ? [ and backslash"
    )
  if "://" in whole:
    return
  try:
    tensorstore.KvStore.Spec({"driver": "file", "path": f"{whole}/"})
  except (ValueError, RuntimeError) as error:
    raise CheckpointError(
      f"{given}: TensorStore cannot write arrays into this folder; choose a path of plain "
      "characters in which no name ends with .__lock"
    ) from error


def steps_in(directory: epath.Path) -> list[int]:
  """Return the steps with a complete checkpoint, oldest first."""
  if not directory.is_dir():
    return []
  numbered = [p for p in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", p.name)]
  return sorted(int(p.name) for p in numbered if ocp.utils.is_checkpoint_finalized(p))


def find_damage(checkpoint: epath.Path) -> str | None:
  """Return what is damaged in a checkpoint directory; None if it is intact."""
  found = checkpoint_manifest.find_damage(checkpoint)
  if found is not None:
    return found
  try:
    step = read_metadata(checkpoint)["step"]
  except CheckpointError as error:
    return str(error)
  if checkpoint.name.isdigit() and int(checkpoint.name) != step:
    return f"it holds step {step}"
  return None


def find_checkpoint(path: epath.PathLike, step: int | None = None) -> epath.Path:
  """Return the directory of one intact checkpoint; reads only.

  Args:
    path: directory of a run (with `checkpoints/` in it), of its checkpoints, or of one checkpoint.
    step: step to find; the newest intact one by default, with a warning for each damaged one that
      is skipped.

  Raises:
    CheckpointError: there is no checkpoint, or the requested one is missing or damaged.
  """
  root = absolute_path(path)
  if (root / "checkpoints").is_dir():
    root = root / "checkpoints"
  single = (root / "state").is_dir()
  steps = [int(root.name)] if single and root.name.isdigit() else steps_in(root)
  by_step = {s: root if single else root / str(s) for s in steps}
  if step is not None and step not in by_step:
    raise CheckpointError(f"no checkpoint of step {step} in {root}; there are {sorted(by_step)}.")
  wanted = by_step if step is None else {step: by_step[step]}
  found = _newest_intact(wanted)
  if found is None:
    what = f"of step {step} " if step is not None else ""
    raise CheckpointError(
      f"no intact checkpoint {what}in {root} ({len(wanted)} checked); expected a run's workdir, "
      "its checkpoints directory or one step of it."
    )
  return by_step[found]


def saved_checkpoint(directory: epath.PathLike, step: int | None = None) -> epath.Path | None:
  """Return the checkpoint that a run in `directory` resumes from; reads only.

  Args:
    directory: directory of the checkpoints of a run; need not exist.
    step: step to find; the newest intact one by default.

  Returns:
    Its directory; None if nothing was saved.

  Raises:
    CheckpointError: the requested checkpoint is missing or damaged, or all of them are damaged.
  """
  root = absolute_path(directory)
  steps = steps_in(root)
  if step is not None and step not in steps:
    raise CheckpointError(
      f"config.eval.checkpoint_step={step}: {root} holds the steps "
      f"{', '.join(map(str, steps)) or '(none)'}; config.checkpoint.keep_last and keep_every "
      "determine which ones are kept"
    )
  if not steps or step is not None:
    return find_checkpoint(root, step) if steps else None
  found = _newest_intact({s: root / str(s) for s in steps})
  if found is None:
    raise CheckpointError(
      f"{root}: all {len(steps)} checkpoints are damaged, such as {steps[-1]}: "
      f"{find_damage(root / str(steps[-1]))}. Restore one from a copy, or choose another "
      "--workdir to start from step 0"
    )
  return root / str(found)


def move_damaged_aside(directory: epath.Path) -> None:
  """Rename damaged checkpoints newer than the newest intact one, so that a run can resume."""
  for step in reversed(steps_in(directory)):
    path = directory / str(step)
    if (found := find_damage(path)) is None:
      return
    names = itertools.chain(
      [f"damaged-{step}"], (f"damaged-{step}-{n}" for n in itertools.count(2))
    )
    aside = next(directory / name for name in names if not (directory / name).exists())
    logging.warning("Checkpoint %s is damaged: %s. Moved to %s.", path, found, aside)
    path.rename(aside)


def remove_unfinished(directory: epath.Path) -> None:
  """Remove interrupted saves. Orbax would do so in a thread that can outlive the program."""
  for path in directory.iterdir():
    if path.is_dir() and ocp.path.step.TMP_DIR_SUFFIX in path.name:
      _rmtree(path)


def delete(checkpoint: epath.Path) -> None:
  """Delete a checkpoint; log a warning if that fails."""
  try:
    _rmtree(checkpoint)
  except Exception as error:  # clients of buckets raise their own types
    logging.warning("Checkpoint %s is not kept, but cannot be deleted: %s.", checkpoint, error)


def _rmtree(folder: epath.Path) -> None:
  folder.rmtree()
  if "://" in str(
    folder
  ):  # in a bucket with folder placeholders, the first round deletes only those
    folder.rmtree(missing_ok=True)


def _newest_intact(by_step: Mapping[int, epath.Path]) -> int | None:
  """Return the newest step with an intact checkpoint, the same one on every process."""
  found = -1
  if jax.process_index() == 0:
    for step in sorted(by_step, reverse=True):
      if (damage := find_damage(by_step[step])) is None:
        found = step
        break
      logging.warning("Checkpoint %s is damaged and passed over: %s.", by_step[step], damage)
  found = int(multihost_utils.broadcast_one_to_all(found))
  return None if found < 0 else found
