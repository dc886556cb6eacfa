"""Report galleries of two-tower models: retrieved items and mistakes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from apps.trainer.gallery import Gallery, GalleryItem, GalleryRow
import ov_eval

FOUND = 5  # number of candidates shown per query
KEPT_PIXELS = 64_000_000  # maximum pixels kept for the galleries of one evaluation


def keep_images(batch: Mapping[str, Any], gallery_images: dict[int, np.ndarray]) -> None:
  """Store the images of a batch by index, up to the memory limit for galleries."""
  room = KEPT_PIXELS // batch["image"][0].size
  for row in np.flatnonzero(batch["valid"]).tolist():
    if len(gallery_images) < room:
      gallery_images[int(batch["index"][row])] = batch["image"][row].copy()


def mistakes(
  worst: ov_eval.Predictions, names: list[str], gallery_images: dict[int, np.ndarray]
) -> Gallery:
  """Return the gallery of the most confident mistakes of zero-shot classification."""
  rows = [
    GalleryRow(
      query=gallery_images[int(index)],
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
    if int(index) in gallery_images
  ]  # fmt: skip
  note = "most confident wrong predictions, with the true class"
  return Gallery("Zero-shot mistakes", note, tuple(rows))


def retrieved(
  images: ov_eval.Collected,
  texts: np.ndarray,
  captions: list[str],
  pairs: np.ndarray,
  found: ov_eval.RetrievalResult,
  gallery_images: dict[int, np.ndarray],
  count: int,
) -> tuple[Gallery, ...]:
  """Return galleries of the first captions, the first images and the worst captions.

  Args:
    images: unit vectors of the images, by row.
    texts: unit vectors [X, E] of the captions.
    captions: X texts.
    pairs: int [P, 2], rows of a caption and an image that belong together.
    found: ranks over all candidates.
    gallery_images: images by index of the example; rows of others are skipped.
    count: number of rows per gallery; 0 disables them.
  """
  name = lambda row: int(images.index[row])
  images_of: dict[int, list[int]] = {}
  texts_of: dict[int, list[int]] = {}
  for text, image in pairs.tolist():
    images_of.setdefault(text, []).append(image)
    texts_of.setdefault(image, []).append(text)

  def by_text(queries: list[int]) -> tuple[GalleryRow, ...]:
    if not queries:
      return ()
    hits = ov_eval.top_retrieved(
      texts[queries], images.vectors, [images_of[query] for query in queries], k=FOUND
    )
    return tuple(
      GalleryRow(
        query=captions[query],
        found=tuple(
          GalleryItem(gallery_images.get(name(row)), "", score, right)
          for row, score, right in zip(hit.found, hit.scores, hit.right, strict=True)
        ),
        rank=hit.rank,
      )
      for query, hit in zip(queries, hits, strict=True)
    )

  def by_image(queries: list[int]) -> tuple[GalleryRow, ...]:
    queries = [row for row in queries if name(row) in gallery_images]
    if not queries:  # another process read the first images
      return ()
    hits = ov_eval.top_retrieved(
      images.vectors[queries],
      texts,
      [texts_of[row] for row in queries],
      k=FOUND,
    )
    return tuple(
      GalleryRow(
        query=gallery_images[name(row)],
        text=captions[texts_of[row][0]],
        found=tuple(
          GalleryItem(None, captions[text], score, right)
          for text, score, right in zip(hit.found, hit.scores, hit.right, strict=True)
        ),
        rank=hit.rank,
      )
      for row, hit in zip(queries, hits, strict=True)
    )

  first_texts = list(range(min(count, len(captions))))
  first_images = sorted(texts_of)[:count]
  worst = [int(query) for query in found.txt2img.worst(count)]
  candidates = f"{len(images.vectors):,} images and {len(captions):,} captions"
  return (
    Gallery("Images retrieved for captions", f"first captions, {candidates}", by_text(first_texts)),
    Gallery("Captions retrieved for images", f"first images, {candidates}", by_image(first_images)),
    Gallery(
      "Worst retrieved captions",
      f"captions with the lowest image rank, {candidates}",
      by_text(worst),
    ),
  )
