"""Writing of files common to several formats; `reading` is the counterpart."""

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
  """Write tensors as safetensors with the metadata that PyTorch libraries require.

  Args:
    path: path of the file.
    flat: tensors by name.
    dtype: dtype of floating-point tensors in the file.
    fixed: computed tensors. They stay float32, so that rounding does not change them.
  """
  kept = {line.theirs: line.value for line in fixed}
  tensors = {name: kept.get(name, _cast(tensor, dtype)) for name, tensor in flat.items()}
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Return indented JSON text with unescaped accents."""
  path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _cast(tensor: np.ndarray, dtype: str) -> np.ndarray:
  tensor = np.asarray(tensor, order="C")
  return tensor.astype(jnp.dtype(dtype)) if np.issubdtype(tensor.dtype, np.floating) else tensor
