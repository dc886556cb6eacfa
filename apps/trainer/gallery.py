"""Galleries of the report: queries with retrieved or predicted items, correct and incorrect."""

import dataclasses
from typing import Any

import numpy as np

from apps.trainer.report_text import thumbnail_url

MAX_ROWS = 24  # maximum number of rows shown per gallery
_DATA_URL = "data:image/"  # prefix of a query that is an image


@dataclasses.dataclass(frozen=True)
class GalleryItem:
  """One retrieved or predicted item: an image, a text, or an image with its text.

  Attributes:
    image: as in `Sample`; None for a text.
    text: caption of the image, or the text; may be empty.
    score: similarity or likelihood; None hides it.
    right: whether the item matches the query.
  """

  image: np.ndarray | str | None
  text: str = ""
  score: float | None = None
  right: bool = False


@dataclasses.dataclass(frozen=True)
class GalleryRow:
  """A query and its items, best first.

  Attributes:
    query: text, or an image as in `Sample`.
    found: items, best first.
    rank: rank of the first correct item among all candidates, from 1; None if unknown.
    text: text next to a query image, such as its true class.
  """

  query: np.ndarray | str
  found: tuple[GalleryItem, ...]
  rank: int | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Rows of one kind, such as images retrieved for texts; `note` describes their selection."""

  title: str
  note: str
  rows: tuple[GalleryRow, ...]


def shrunk(gallery: Gallery) -> Gallery:
  """Return the visible rows, with images as data URLs."""
  rows = [
    dataclasses.replace(
      row,
      query=_url(row.query),
      found=tuple(
        dataclasses.replace(item, image=None if item.image is None else _url(item.image))
        for item in row.found
      ),
    )
    for row in gallery.rows[:MAX_ROWS]
  ]
  return dataclasses.replace(gallery, rows=tuple(rows))


def from_json(plain: dict[str, Any]) -> Gallery:
  """Return the gallery for the `dataclasses.asdict` of a shrunk gallery."""
  rows = [
    GalleryRow(**{**row, "found": tuple(GalleryItem(**item) for item in row["found"])})
    for row in plain["rows"]
  ]
  return Gallery(**{**plain, "rows": tuple(rows)})


def view(gallery: Gallery) -> dict[str, Any]:
  """Return the template variables; a row shows images if any of its items has one."""
  rows = []
  for row in shrunk(gallery).rows:
    query = _url(row.query)
    is_image = query.startswith(_DATA_URL)
    rows.append(
      {
        "image": query if is_image else "",
        "text": row.text if is_image else query,
        "rank": row.rank,
        "found": row.found,
        "has_images": any(item.image is not None for item in row.found),
      }
    )
  return {"title": gallery.title, "note": gallery.note, "rows": rows}


def _url(image: np.ndarray | str) -> str:
  return image if isinstance(image, str) else thumbnail_url(image)
