"""Properties of compiled programs."""

import math
import re

import jax


def largest_array(compiled: jax.stages.Compiled) -> int:
  """Return the number of elements of the largest array on one device."""
  shapes = re.findall(r"\b[a-z]+\d+\w*\[([\d,]+)\]", compiled.as_text() or "")
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)
