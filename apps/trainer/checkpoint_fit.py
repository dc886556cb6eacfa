"""Comparison of the arrays of a checkpoint with the state of a run and its settings."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from apps.trainer import checkpoint_upgrade
from apps.trainer.checkpoint_metadata import CheckpointError
from apps.trainer.errors import one_line
from apps.trainer.names import leaf_values
from apps.trainer.paths import flatten_paths

PyTree = Any

# Sections of the configuration that determine the shapes of a train state.
_SECTIONS = ("model", "optimizer", "tokenizer")


def saved_arrays(checkpoint: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Return path -> shape and dtype of every array in a checkpoint, e.g. `params/encoder/cls`.

  Raises:
    CheckpointError: the array metadata are damaged.
  """
  try:
    return {
      path: jax.ShapeDtypeStruct(array.shape, array.dtype)
      for path, array in flatten_paths(saved_tree(checkpoint)).items()
    }
  except Exception as error:  # of any library that reads it
    raise CheckpointError(
      f"{checkpoint}: the description of its arrays cannot be read: {one_line(error, 300)}"
    ) from error


def saved_tree(checkpoint: epath.Path) -> PyTree:
  """Return the tree of array metadata of a checkpoint that `saved_arrays` can read."""
  return ocp.PyTreeCheckpointHandler().metadata(checkpoint / "state").tree


def check_restorable(
  checkpoint: epath.Path,
  abstract: PyTree,
  *,
  partial: bool = False,
  config: Mapping[str, Any] | None = None,
  saved_config: Mapping[str, Any] | None = None,
) -> None:
  """Compare a checkpoint directory with the tree to restore; reads no array.

  Args:
    checkpoint: directory returned by `find_checkpoint`.
    abstract: ShapeDtypeStructs of the tree to restore.
    partial: allow arrays in the checkpoint that `abstract` lacks.
    config: configuration of the run, used to list the settings that differ.
    saved_config: configuration saved in the metadata of the checkpoint.

  Raises:
    CheckpointError: arrays are missing, unexpected, or differ in shape or dtype; the message shows
      the first of them and the settings that differ, in one line.
  """
  saved = {checkpoint_upgrade.named_path(p): x for p, x in saved_arrays(checkpoint).items()}
  differences = _differences(saved, flatten_paths(abstract), partial)
  if not differences:
    return
  differences.sort(key=lambda line: not line.startswith("params/"))  # they cause all others
  roots = {line.split("/")[0].split(":")[0] for line in differences}
  holds_other = (
    "has a different optimizer state than this run,"
    if roots == {"opt"}
    else "does not fit this run"
  )
  shown = "; ".join(differences[: 1 if roots == {"opt"} else 3])
  changed = _changed(saved_config, config)
  if changed:
    remedy = f"Settings that differ: {'; '.join(changed[:5])}. Set them as they were saved"
  elif roots == {"opt"}:
    remedy = "Keep config.optimizer.name, options, mu_dtype, second_moment and frozen as they were"
  elif roots == {"ema"}:
    remedy = "Keep config.optimizer.ema_decay as it was"
  else:
    remedy = "Resume with the config it was trained with"
  raise CheckpointError(
    f"{checkpoint} {holds_other} in {len(differences)} arrays, such as {shown}. {remedy} (the "
    "config is saved in its metadata), choose another --workdir, or use only its parameters "
    "with config.init_from"
  )


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


def _changed(saved: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> list[str]:
  """Return the settings of `_SECTIONS` that differ, as `config.NAME: saved VALUE, now VALUE`."""
  if saved is None or config is None:
    return []
  lines = []
  for section in _SECTIONS:
    before, now = (
      {
        f"config.{name}": json.dumps(value, default=str)
        for name, value in leaf_values({section: tree.get(section)})
      }
      for tree in (saved, config)
    )
    if section == "optimizer":
      before = {"config.optimizer.name": '"adamw"'} | before  # earlier versions had no other
    lines += [
      f"{name}: saved {before[name]}, now {value}"
      for name, value in now.items()
      if name in before and before[name] != value
    ]
  return lines
