"""Checks of image and batch sizes before anything is allocated."""

import os

import jax

from apps.trainer.run_config import RunConfig
from apps.trainer.task import Task

_MAX_PATCHES = 2**16  # attention is quadratic in it


def check_patches(task: Task) -> None:
  """Check the number of patches of an image.

  Raises:
    ValueError: there are more patches than attention supports.
  """
  encoder = task.model.encoder
  if encoder.num_patches > _MAX_PATCHES:
    raise ValueError(
      f"config.model.image_size={encoder.image_size} with patches of {encoder.patch_size} px makes "
      f"{encoder.num_patches:,} patches; expected at most {_MAX_PATCHES:,}: lower the size, or "
      "take larger patches, such as config.model.encoder=Ti/16"
    )


def border_note(task: Task) -> str | None:
  """Return a warning on image borders that fill no patch and are ignored; None without one."""
  encoder = task.model.encoder
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


def check_batch_memory(config: RunConfig, task: Task) -> None:
  """Check that a batch fits into the memory of this host.

  Args:
    config: configuration of a stage.
    task: task of the stage.

  Raises:
    ValueError: the images and texts of this process exceed the memory.
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
  """Return the bytes of memory of this host; None if unknown."""
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError):
    return None
