"""What the formats of other libraries have in common: positions, ratios, fields that differ."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ov_convert.fields import shown
from ov_convert.name_map import Entry, Fixed, Transform
import ov_models

# Dtypes of files, and how far rounding to them moves a number, relative to it.
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def position_table(config: ov_models.ViTConfig) -> np.ndarray:
  """Computed positions at `config.image_size`, float32 [1 + T, D]; the cls token's are 0."""
  table = ov_models.sincos2d(*config.grid, config.width)
  return np.concatenate([np.zeros((1, config.width), np.float32), table])


def position(
  theirs: str, config: ov_models.ViTConfig, ours: str, transform: Transform
) -> Entry | Fixed:
  """The line of a name map for a table of positions, learned or computed.

  Args:
    theirs: name of their tensor.
    config: of the tower.
    ours: path of the tower's parameters, e.g. "encoder/".
    transform: from [1 + T, D] to theirs.
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
  """Whether a table [1 + T, D] is the computed one as a file keeps it: "sincos2d", or "learned"."""
  grid, width = image_size // patch_size, table.shape[-1]
  if width % 4 or width < 8 or table.shape != (1 + grid * grid, width):
    return "learned"
  computed = ov_models.sincos2d(grid, grid, width)
  distance = np.abs(table[1:] - computed)
  for dtype, rounding in _ROUNDING.items():
    kept = (table.astype(jnp.dtype(dtype)).astype(np.float32) == table).all()
    # 2e-6: where the table was computed in float32, the frequencies are rounded already.
    if kept and not table[0].any() and (distance <= rounding * np.abs(computed) + 2e-6).all():
      return "sincos2d"
  return "learned"


def mlp_ratio(width: int, mlp_dim: int) -> float:
  """A ratio of which other libraries make `mlp_dim`, by int(width * ratio)."""
  ratio = mlp_dim / width
  while int(width * ratio) < mlp_dim:
    ratio = float(np.nextafter(ratio, np.inf))
  return ratio


def unlike(
  fields: Mapping[str, Any], wanted: Mapping[str, Any], read: set[str], prefix: str
) -> list[str]:
  """Fields that differ from what is wanted, and unknown ones that are set."""
  found = [
    f"{prefix}{name}={shown(fields[name])} (must be {value!r})"
    for name, value in wanted.items()
    if name in fields and fields[name] != value
  ]
  unknown = fields.keys() - wanted.keys() - read
  return found + [f"{prefix}{n}={shown(fields[n])} (unknown)" for n in sorted(unknown) if fields[n]]
