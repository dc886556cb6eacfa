"""Functions shared by the formats of other libraries: positions, MLP ratios, field checks."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ov_convert.fields import shown
from ov_convert.name_map import Entry, Fixed, Transform
import ov_models

# Dtypes of files with their relative rounding errors.
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def position_table(config: ov_models.ViTConfig) -> np.ndarray:
  """Return computed positions for `config.image_size`, float32 [1 + T, D]; 0 for the cls token."""
  table = ov_models.sincos2d(*config.grid, config.width)
  return np.concatenate([np.zeros((1, config.width), np.float32), table])


def position(
  theirs: str, config: ov_models.ViTConfig, ours: str, transform: Transform
) -> Entry | Fixed:
  """Return the name map entry of a position table, learned or computed.

  Args:
    theirs: name of their tensor.
    config: configuration of the tower.
    ours: path of the parameters of the tower, e.g. "encoder/".
    transform: transform from [1 + T, D] to theirs.
  """
  if config.position == "learned":
    return Entry(theirs, (f"{ours}position_embedding",), transform)
  return Fixed(
    theirs,
    transform.forward(position_table(config)),
    "positions are those of position='sincos2d', which are computed",
  )


def kind_of_positions(
  table: np.ndarray, image_size: int, patch_size: int
) -> Literal["sincos2d", "learned"]:
  """Return "sincos2d" if a table [1 + T, D] is the computed one up to rounding, else "learned"."""
  grid, width = image_size // patch_size, table.shape[-1]
  if width % 4 or width < 8 or table.shape != (1 + grid * grid, width):
    return "learned"
  computed = ov_models.sincos2d(grid, grid, width)
  distance = np.abs(table[1:] - computed)
  for dtype, rounding in _ROUNDING.items():
    kept = (table.astype(jnp.dtype(dtype)).astype(np.float32) == table).all()
    # 2e-6: rounding of the frequencies, if the table was computed in float32.
    if kept and not table[0].any() and (distance <= rounding * np.abs(computed) + 2e-6).all():
      return "sincos2d"
  return "learned"


def mlp_ratio(width: int, mlp_dim: int) -> float:
  """Return a ratio for which int(width * ratio), as in other libraries, equals `mlp_dim`."""
  ratio = mlp_dim / width
  while int(width * ratio) < mlp_dim:
    ratio = float(np.nextafter(ratio, np.inf))
  return ratio


def field_mismatches(
  fields: Mapping[str, Any], wanted: Mapping[str, Any], read: set[str], prefix: str
) -> list[str]:
  """Return messages for fields that differ from the required values, and for unknown fields."""
  found = [
    f"{prefix}{name}={shown(fields[name])} (must be {value!r})"
    for name, value in wanted.items()
    if name in fields and fields[name] != value
  ]
  unknown = fields.keys() - wanted.keys() - read
  return found + [f"{prefix}{n}={shown(fields[n])} (unknown)" for n in sorted(unknown) if fields[n]]
