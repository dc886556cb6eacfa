"""Format "openvision_jax": checkpoints of the released JAX code; imported only."""

from pathlib import Path
from typing import TYPE_CHECKING

from apps.exporter.formats import format as form

if TYPE_CHECKING:
  from ov_convert.release import Imported

_IMAGE_SIZE = 224  # of published checkpoints, which do not state it


def _read(folder: Path, options: form.ReadOptions) -> "Imported":
  from ov_convert import orbax_folder

  return orbax_folder.read(
    folder, image_size=options.image_size or _IMAGE_SIZE, num_heads=options.num_heads
  )


FORMAT = form.Format(name="openvision_jax", read=_read, reads=("image_size", "num_heads"))
