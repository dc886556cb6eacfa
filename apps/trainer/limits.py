"""Sizes that a machine cannot hold, and pixels that no patch covers, before anything is made."""

import os
from typing import Any

import jax
from ml_collections import ConfigDict

from apps.trainer.task import Task
import ov_models

_MOST_PATCHES = 2**16  # attention needs their square


def check_patches(task: Task) -> None:
  """Check how many patches an image has.

  Raises:
    ValueError: more than attention can take.
  """
  encoder = _encoder(task)
  if encoder is not None and encoder.num_patches > _MOST_PATCHES:
    raise ValueError(
      f"config.model.image_size={encoder.image_size} with patches of {encoder.patch_size} px makes "
      f"{encoder.num_patches:,} patches; expected at most {_MOST_PATCHES:,}: lower the size, or "
      "take larger patches, such as config.model.encoder=Ti/16"
    )


def border_note(task: Task) -> str | None:
  """Describe the border of an image that fills no patch and is ignored; None without one."""
  encoder = _encoder(task)
  if encoder is None:
    return None
  size, patch = encoder.image_size, encoder.patch_size
  rows, _ = encoder.dropped_pixels(size, size)
  if not rows:
    return None
  ignored = 1 - ((size - rows) / size) ** 2
  return (
    f"warning: config.model.image_size={size} is not a multiple of the patch size {patch}: the "
    f"last {rows} rows and columns ({ignored:.1%} of the pixels) are ignored; the nearest "
    f"multiples are {size - rows} and {size - rows + patch}"
  )


def check_batch_memory(config: ConfigDict, task: Task) -> None:
  """Check that a batch fits into the memory of this machine.

  Args:
    config: of a stage.
    task: of the stage.

  Raises:
    ValueError: the images and texts of this process's rows need more than there is.
  """
  texts = max(1, len(task.text_specs or {}))
  example = 3 * task.image_size**2 + 5 * texts * task.text_len
  needed, memory = config.batch_size // jax.process_count() * example, _memory()
  if memory is not None and needed > memory:
    raise ValueError(
      f"config.batch_size={config.batch_size} at {task.image_size} px needs {needed / 2**30:,.1f} "
      f"GiB on each host for one batch, and this host has {memory / 2**30:,.1f} GiB; lower "
      "config.batch_size or config.model.image_size"
    )


def _memory() -> int | None:
  """Bytes of memory of this machine; None where the system does not know."""
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError):
    return None


def _encoder(task: Task) -> ov_models.ViTConfig | None:
  """The vision tower of a task, where it has one of ov_models."""
  encoder: Any = getattr(getattr(task, "model", None), "encoder", None)
  return encoder if isinstance(encoder, ov_models.ViTConfig) else None
