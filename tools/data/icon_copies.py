"""Detection of icons that are copies of other icons, by the correlation of small images.

Sets copy each other with another margin, size or colour, so icons are compared in gray after their
margins are removed. A hash of a cosine transform is not used: half of the coefficients of a
symmetric drawing are zero, and their signs change with the size of the drawing.
"""

from collections.abc import Iterable, Mapping
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE = 16  # pixels of a compared image
# Least correlation of two copies, chosen by looking at pairs of icons.
COPY_CORRELATION = 0.97
_INK = 24  # of 255; difference from white of a pixel that belongs to the drawing
_MARGIN = 0.25  # white around the drawing, so that a filled square is not constant
_FILTER = Image.Resampling.BILINEAR
_BLOCK = 64  # queries compared with all candidates at a time


class SmallIcons(NamedTuple):
  """Icons as unit vectors of their pixels.

  Attributes:
    vectors: float32 [N, 256], see `small_vector`.
    texts: names of each icon.
    keys: key of each icon, "set:name".
  """

  vectors: np.ndarray
  texts: list[tuple[str, ...]]
  keys: list[str]

  @property
  def sets(self) -> list[str]:
    """Set of each icon."""
    return [key.partition(":")[0] for key in self.keys]

  def of_set(self, name: str) -> "SmallIcons":
    """Return the icons of one set."""
    rows = [row for row, found in enumerate(self.sets) if found == name]
    return SmallIcons(
      self.vectors[rows], [self.texts[i] for i in rows], [self.keys[i] for i in rows]
    )


def small_icons(rows: Iterable[Mapping[str, Any]]) -> SmallIcons:
  """Return the icons of records with `jpg`, `txt` and `key`."""
  vectors, texts, keys = [], [], []
  for row in rows:
    vectors.append(png_vector(row["jpg"][0]))
    texts.append(tuple(text.decode() for text in row["txt"]))
    keys.append(row["key"][0].decode())
  return SmallIcons(np.asarray(vectors, np.float32).reshape(-1, SIDE**2), texts, keys)


def png_vector(png: bytes) -> np.ndarray:
  """Return `small_vector` of an encoded icon, float32 [D]."""
  with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
    return small_vector(np.asarray(image.convert("RGB")))


def small_vector(pixels: np.ndarray) -> np.ndarray:
  """Return a small image of the drawing as a unit vector with mean 0.

  Args:
    pixels: uint8 [S, S, 3], drawn on white.

  Returns:
    float32 [SIDE * SIDE]; the dot product of two of them is the correlation of the small images.
  """
  ink = 255 - np.asarray(Image.fromarray(pixels).convert("L"))
  (top, bottom), (left, right) = (_extent(ink.max(axis)) for axis in (1, 0))
  half = max(bottom - top, right - left) / 2 * (1 + _MARGIN)
  pad = len(ink)  # the square around an elongated drawing may leave the image
  row, column = (top + bottom) / 2 + pad, (left + right) / 2 + pad
  box = (column - half, row - half, column + half, row + half)
  image = Image.fromarray(np.pad(ink, pad)).resize((SIDE, SIDE), _FILTER, box)
  vector = np.asarray(image, np.float32).ravel()
  vector -= vector.mean()
  return vector / np.float32(np.linalg.norm(vector) + 1e-6)


def _extent(ink: np.ndarray) -> tuple[float, float]:
  """Return where the drawing starts and ends, in fractions of a pixel.

  Args:
    ink: uint8 [S], the largest ink of each row or column. The ink of a border pixel, compared with
      that of the whole drawing, is the fraction of the pixel that the drawing covers.
  """
  inside = np.flatnonzero(ink > _INK)
  if not len(inside):
    return 0.0, float(len(ink))
  first, last, most = inside[0], inside[-1], float(ink.max())
  return first + 1 - ink[first] / most, last + ink[last] / most


def nearest(queries: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the candidate with the highest dot product for each query.

  Args:
    queries: float32 [Q, D].
    candidates: float32 [C, D], at least one.

  Returns:
    rows int64 [Q] and dot products float32 [Q].
  """
  rows = np.zeros(len(queries), np.int64)
  scores = np.zeros(len(queries), np.float32)
  for start in range(0, len(queries), _BLOCK):
    block = slice(start, start + _BLOCK)
    table = queries[block] @ candidates.T
    rows[block], scores[block] = table.argmax(1), table.max(1)
  return rows, scores
