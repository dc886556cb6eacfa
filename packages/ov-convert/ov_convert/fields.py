"""Validation of values in untrusted JSON configurations.

Sizes determine the length of loops and the memory that is allocated. They are checked against fixed
limits when they are read, and against the weights before they are used.
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

MAX_DEPTH = 1024
MAX_WIDTH = 1 << 16  # width of a residual stream or head; MLPs may be 4 times as wide
MAX_SIDE = 1 << 14  # pixels of an image or a patch
MAX_TOKENS = 1 << 20  # text positions
MAX_VOCABULARY = 1 << 22
_MAX_NUMBER = 1e6  # means, deviations, ratios and scales


def section(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
  """Return the object under `name`, or an empty one if it is missing or null.

  Raises:
    ValueError: if the value is not an object.
  """
  found = content.get(name)
  if found is None:
    return {}
  if not isinstance(found, Mapping):
    raise ValueError(f"{where}{name}={shown(found)}; expected an object {{...}}.")
  return found


def integer(
  content: Mapping[str, Any],
  name: str,
  default: int | None,
  high: int,
  where: str = "",
  low: int = 1,
) -> int:
  """Return an integer field.

  Args:
    content: JSON object.
    name: name of the field.
    default: value of a missing field; None if the field is required.
    high: largest allowed value.
    where: file or object, for error messages.
    low: smallest allowed value.

  Raises:
    ValueError: if the field is missing, not an integer, or out of range.
  """
  value = content.get(name, default)
  if type(value) is not int or not low <= value <= high:
    raise ValueError(f"{where}{name}={shown(value)}; expected an integer from {low} to {high}.")
  return value


def number(content: Mapping[str, Any], name: str, default: float, where: str = "") -> float:
  """Return a finite number of at most 1e6; see `integer`."""
  value = content.get(name, default)
  if not is_number(value):
    raise ValueError(f"{where}{name}={shown(value)}; expected a number below {_MAX_NUMBER:.0f}.")
  return float(value)


def channel_values(
  content: Mapping[str, Any], name: str, default: tuple[float, ...], where: str = ""
) -> tuple[float, float, float]:
  """Return three numbers, one per channel; null means the default; see `integer`."""
  value = content.get(name)
  value = default if value is None else value
  if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(is_number, value)):
    raise ValueError(f"{where}{name}={shown(value)}; expected three numbers.")
  red, green, blue = map(float, value)
  return red, green, blue


def is_number(value: Any) -> bool:
  """Return whether a JSON value is a finite number of at most 1e6; booleans are not numbers."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and abs(value) <= _MAX_NUMBER
    and math.isfinite(value)
  )


def check_against_weights(
  flat: Mapping[str, np.ndarray], depth: int, sizes: Mapping[str, int], where: str
) -> None:
  """Check that a configuration is plausible for the given tensors.

  After this check, the stated sizes are safe for loops and allocations.

  Args:
    flat: tensors by name.
    depth: number of layers; each has at least one tensor.
    sizes: values by field name; each must be a dimension of some tensor.
    where: file with these values, for error messages.

  Raises:
    ValueError: if the sizes do not fit the tensors.
  """
  if depth > len(flat):
    raise ValueError(
      f"{where} states {depth} layers, but the weights hold {len(flat)} tensors; the files belong "
      "to different models."
    )
  held = {side for tensor in flat.values() for side in np.shape(tensor)}
  for name, size in sizes.items():
    if size not in held:
      raise ValueError(
        f"{where} states {name}={size}, but no tensor has a dimension of {size}; the files are of "
        "two models."
      )


def shown(value: Any) -> str:
  """Return the repr of a value as one short line."""
  text = "".join(c if c.isprintable() else "?" for c in repr(value))
  return text if len(text) <= 80 else f"{text[:80]}..."
