"""Linear heads on image embeddings, from files."""

from collections.abc import Sequence
import io
import os
import zipfile

import numpy as np
from numpy.typing import NDArray
import safetensors
import safetensors.numpy

from ov_data import fs
from ov_data.annotation import LinearHead

_MAX_BYTES = 64 << 20
_EXPECTED = "expected the arrays weight [E] or [1, E], and optionally bias of one number"


def read_heads(given: Sequence[str]) -> dict[str, LinearHead]:
  """Read heads from "NAME=FILE" texts.

  Args:
    given: texts with the name of the column and a file, see `read_head`.

  Raises:
    ValueError: if a text has another form, a name is repeated, or a file is not usable.
  """
  heads: dict[str, LinearHead] = {}
  for text in given:
    name, equals, path = text.partition("=")
    if not (name and equals and path) or name in heads:
      raise ValueError(f"--heads={text}: expected NAME=FILE with a different name for each file")
    heads[name] = read_head(os.path.expanduser(path))
  return heads


def read_head(path: str) -> LinearHead:
  """Read a head from a .safetensors or .npz file; pickled arrays are rejected.

  Args:
    path: file with the arrays `weight` [E] or [1, E], like torch.nn.Linear, and optionally `bias`.

  Raises:
    ValueError: if the file is missing, damaged, too large, or has other arrays.
  """
  try:
    data = fs.read_regular(path, _MAX_BYTES)
    arrays = safetensors.numpy.load(data) if path.endswith(".safetensors") else _npz(data)
    weight, bias = arrays.pop("weight"), arrays.pop("bias", np.zeros(1))
    if arrays:
      raise ValueError(f"it also has {', '.join(sorted(arrays))}")
    if weight.dtype.kind != "f" or bias.dtype.kind != "f" or bias.size != 1:
      raise ValueError(f"weight is {weight.dtype}, bias is {bias.dtype} {bias.shape}")
    if weight.ndim == 2 and len(weight) == 1:
      weight = weight[0]
    return LinearHead(weight.astype(np.float32), float(bias.reshape(())))
  except KeyError as error:
    raise ValueError(f"{path} has no array {error}; {_EXPECTED}") from None
  except (
    ValueError, OSError, TypeError, safetensors.SafetensorError, zipfile.BadZipFile
  ) as error:  # fmt: skip
    reason = str(error).partition("\n")[0]
    raise ValueError(f"{path} is not usable ({reason}); {_EXPECTED}") from None


def _npz(data: bytes) -> dict[str, NDArray[np.generic]]:
  """Return the arrays of an npz file without pickle; sizes are limited before they are read."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
      raise ValueError(f"its arrays have more than {_MAX_BYTES:,} bytes")
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    return {name: arrays[name] for name in arrays.files}
