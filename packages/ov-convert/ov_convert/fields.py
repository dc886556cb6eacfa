"""Typed, bounded values out of JSON that others wrote.

Nothing in a foreign configuration is trusted: a size decides how long loops run and how much memory
is taken. Sizes are checked against fixed limits when they are read, and against the weights before
anything is computed from them.
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

MAX_DEPTH = 1024
MAX_WIDTH = 1 << 16  # of a residual stream, a head, an MLP or an embedding: up to 4 times as wide
MAX_SIDE = 1 << 14  # pixels of an image or a patch
MAX_TOKENS = 1 << 20  # positions of a text
MAX_VOCABULARY = 1 << 22
_MAX_NUMBER = 1e6  # of means, deviations, ratios and scales


def section(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
  """Return the object under `name`; an empty one where there is none or null.

  Raises:
    ValueError: it is no object.
  """
  found = content.get(name)
  if found is None:
    return {}
  if not isinstance(found, Mapping):
    raise ValueError(f"{where}{name}={shown(found)}; expected an object {{...}}.")
  return found


def whole(
  content: Mapping[str, Any],
  name: str,
  default: int | None,
  high: int,
  where: str = "",
  low: int = 1,
) -> int:
  """Return a whole number.

  Args:
    content: a JSON object.
    name: of its field.
    default: what a missing field stands for; None: it must be there.
    high: the largest that is allowed.
    where: the file or object, for messages.
    low: the smallest that is allowed.

  Raises:
    ValueError: it is missing, of another type, or out of bounds.
  """
  value = content.get(name, default)
  if type(value) is not int or not low <= value <= high:
    raise ValueError(f"{where}{name}={shown(value)}; expected a whole number from {low} to {high}.")
  return value


def number(content: Mapping[str, Any], name: str, default: float, where: str = "") -> float:
  """Return a finite number of at most a million; see `whole`."""
  value = content.get(name, default)
  if not is_number(value):
    raise ValueError(f"{where}{name}={shown(value)}; expected a number below {_MAX_NUMBER:.0f}.")
  return float(value)


def three(
  content: Mapping[str, Any], name: str, default: tuple[float, ...], where: str = ""
) -> tuple[float, float, float]:
  """Return a number for each channel; null stands for the default, see `whole`."""
  value = content.get(name)
  value = default if value is None else value
  if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(is_number, value)):
    raise ValueError(f"{where}{name}={shown(value)}; expected three numbers.")
  red, green, blue = map(float, value)
  return red, green, blue


def is_number(value: Any) -> bool:
  """Whether a JSON value is a number that floats hold; true and false are none."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and abs(value) <= _MAX_NUMBER
    and math.isfinite(value)
  )


def check_against_weights(
  flat: Mapping[str, np.ndarray], depth: int, sizes: Mapping[str, int], where: str
) -> None:
  """Raise ValueError unless tensors can be those of a model of these sizes.

  Loops over layers and tables of a stated width are safe after this.

  Args:
    flat: tensors by name.
    depth: stated number of layers; each has a tensor or more.
    sizes: by field, numbers that must be a dimension of some tensor.
    where: what states them.
  """
  if depth > len(flat):
    raise ValueError(
      f"{where} states {depth} layers, but the weights hold {len(flat)} tensors; the files are of "
      "two models."
    )
  held = {side for tensor in flat.values() for side in np.shape(tensor)}
  for name, size in sizes.items():
    if size not in held:
      raise ValueError(
        f"{where} states {name}={size}, but no tensor has a dimension of {size}; the files are of "
        "two models."
      )


def shown(value: Any) -> str:
  """Return a value as one short line."""
  text = "".join(c if c.isprintable() else "?" for c in repr(value))
  return text if len(text) <= 80 else f"{text[:80]}..."
