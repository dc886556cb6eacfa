"""Pictures for the report: what a two-tower model found for a text or a picture, and got wrong."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from apps.trainer.gallery import Gallery, GalleryItem, GalleryRow
import ov_eval

FOUND = 5  # candidates shown for each query
KEPT_PIXELS = 64_000_000  # of pictures kept for the galleries of one evaluation


def keep_pictures(batch: Mapping[str, Any], pictures: dict[int, np.ndarray]) -> None:
  """Keeps the pictures of a batch by index, as far as memory for galleries allows."""
  room = KEPT_PIXELS // batch["image"][0].size
  for row in np.flatnonzero(batch["valid"]).tolist():
    if len(pictures) < room:
      pictures[int(batch["index"][row])] = batch["image"][row].copy()


def mistakes(
  worst: ov_eval.Predictions, names: list[str], pictures: dict[int, np.ndarray]
) -> Gallery:
  """Zero-shot classification: pictures put most confidently into the wrong class."""
  rows = [
    GalleryRow(
      query=pictures[int(index)],
      text=names[label],
      found=(
        GalleryItem(None, names[predicted], float(score)),
        GalleryItem(None, names[label], float(label_score), right=True),
      ),
      rank=int(rank) + 1,
    )
    for index, label, predicted, rank, score, label_score in zip(
      worst.index, worst.label, worst.predicted, worst.rank, worst.score, worst.label_score,
      strict=True,
    )
    if int(index) in pictures
  ]  # fmt: skip
  note = "pictures put most confidently into the wrong class, and their own"
  return Gallery("Zero-shot mistakes", note, tuple(rows))


def retrieved(
  images: ov_eval.Collected,
  texts: np.ndarray,
  captions: list[str],
  owner: np.ndarray,
  found: ov_eval.RetrievalResult,
  pictures: dict[int, np.ndarray],
  count: int,
) -> tuple[Gallery, ...]:
  """Pictures found for the first captions, captions for the first pictures, and the worst.

  Args:
    images: unit vectors of the pictures, by row.
    texts: unit vectors [X, E] of the captions.
    captions: X texts.
    owner: int [X], the row of each caption's picture.
    found: ranks over all candidates.
    pictures: by index of the example; rows of others are left out.
    count: rows of each gallery; 0 leaves all of them empty.
  """
  name = lambda row: int(images.index[row])

  def by_text(queries: list[int]) -> tuple[GalleryRow, ...]:
    if not queries:
      return ()
    hits = ov_eval.top_retrieved(
      texts[queries], images.vectors, [[int(owner[query])] for query in queries], k=FOUND
    )
    return tuple(
      GalleryRow(
        query=captions[query],
        found=tuple(
          GalleryItem(pictures.get(name(row)), "", score, right)
          for row, score, right in zip(hit.found, hit.scores, hit.right, strict=True)
        ),
        rank=hit.rank,
      )
      for query, hit in zip(queries, hits, strict=True)
    )

  def by_picture(queries: list[int]) -> tuple[GalleryRow, ...]:
    queries = [row for row in queries if name(row) in pictures]
    if not queries:  # the first pictures were read by another process
      return ()
    hits = ov_eval.top_retrieved(
      images.vectors[queries],
      texts,
      [np.flatnonzero(owner == row).tolist() for row in queries],
      k=FOUND,
    )
    return tuple(
      GalleryRow(
        query=pictures[name(row)],
        text=captions[int(np.flatnonzero(owner == row)[0])],
        found=tuple(
          GalleryItem(None, captions[text], score, right)
          for text, score, right in zip(hit.found, hit.scores, hit.right, strict=True)
        ),
        rank=hit.rank,
      )
      for row, hit in zip(queries, hits, strict=True)
    )

  first_texts = list(range(min(count, len(captions))))
  first_pictures = sorted(set(owner.tolist()))[:count]
  worst = [int(query) for query in found.txt2img.worst(count)]
  candidates = f"of {len(images.vectors):,} pictures and {len(captions):,} captions"
  return (
    Gallery(
      "Pictures found for captions", f"the first captions, {candidates}", by_text(first_texts)
    ),
    Gallery(
      "Captions found for pictures", f"the first pictures, {candidates}", by_picture(first_pictures)
    ),
    Gallery("Worst retrieved captions", f"whose picture ranks last, {candidates}", by_text(worst)),
  )
