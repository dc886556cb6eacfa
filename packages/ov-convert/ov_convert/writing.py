"""Writes the files that formats of other libraries have in common; `reading` reads them."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ov_convert.name_map import Fixed


def write_weights(
  path: pathlib.Path, flat: Mapping[str, np.ndarray], dtype: str, fixed: tuple[Fixed, ...]
) -> None:
  """Tensors as safetensors, marked as PyTorch's libraries want them.

  Args:
    path: of the file.
    flat: tensors by their names.
    dtype: of floating-point tensors in the file.
    fixed: those that are computed and not learned. They keep float32: rounding them would be an
      error of the format.
  """
  kept = {line.theirs: line.value for line in fixed}
  tensors = {name: kept.get(name, _cast(tensor, dtype)) for name, tensor in flat.items()}
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Indented, as people read it; accents as they are."""
  path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _cast(tensor: np.ndarray, dtype: str) -> np.ndarray:
  tensor = np.asarray(tensor, order="C")
  return tensor.astype(jnp.dtype(dtype)) if np.issubdtype(tensor.dtype, np.floating) else tensor
