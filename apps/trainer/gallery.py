"""Galleries of the report: what was found for a text or a picture, right and wrong."""

import dataclasses
from typing import Any

import numpy as np

from apps.trainer.report_text import thumbnail_url

MOST_ROWS = 24  # shown of a gallery
_DATA_URL = "data:image/"  # how a query that is a picture begins


@dataclasses.dataclass(frozen=True)
class GalleryItem:
  """One thing that was found: a picture, a text, or a picture with its text.

  Attributes:
    image: as in `Sample`; None for a text alone.
    text: what stands under the picture; may be empty.
    score: similarity or likelihood; None shows none.
    right: whether it belongs to the query.
  """

  image: np.ndarray | str | None
  text: str = ""
  score: float | None = None
  right: bool = False


@dataclasses.dataclass(frozen=True)
class GalleryRow:
  """A query, and what was found for it, best first.

  Attributes:
    query: a text, or a picture as in `Sample`.
    found: best first.
    rank: place of the first right answer among all candidates, from 1; None if not known.
    text: beside a picture that is the query, such as its true class.
  """

  query: np.ndarray | str
  found: tuple[GalleryItem, ...]
  rank: int | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Rows of one kind, such as the pictures found for texts; `note` says how they were chosen."""

  title: str
  note: str
  rows: tuple[GalleryRow, ...]


def shrunk(gallery: Gallery) -> Gallery:
  """The rows that are shown, with their pictures as data URLs."""
  rows = [
    dataclasses.replace(
      row,
      query=_url(row.query),
      found=tuple(
        dataclasses.replace(item, image=None if item.image is None else _url(item.image))
        for item in row.found
      ),
    )
    for row in gallery.rows[:MOST_ROWS]
  ]
  return dataclasses.replace(gallery, rows=tuple(rows))


def from_json(plain: dict[str, Any]) -> Gallery:
  """The reverse of `dataclasses.asdict` of a shrunk gallery."""
  rows = [
    GalleryRow(**{**row, "found": tuple(GalleryItem(**item) for item in row["found"])})
    for row in plain["rows"]
  ]
  return Gallery(**{**plain, "rows": tuple(rows)})


def view(gallery: Gallery) -> dict[str, Any]:
  """What the template needs; a row shows pictures if anything that was found has one."""
  rows = []
  for row in shrunk(gallery).rows:
    query = _url(row.query)
    is_picture = query.startswith(_DATA_URL)
    rows.append(
      {
        "picture": query if is_picture else "",
        "text": row.text if is_picture else query,
        "rank": row.rank,
        "found": row.found,
        "pictures": any(item.image is not None for item in row.found),
      }
    )
  return {"title": gallery.title, "note": gallery.note, "rows": rows}


def _url(picture: np.ndarray | str) -> str:
  return picture if isinstance(picture, str) else thumbnail_url(picture)
