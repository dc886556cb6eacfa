"""Tests of the galleries of two-tower models, including empty ones."""

import numpy as np

from apps import clip_gallery
import ov_eval

IMAGES = {10 + row: np.full((2, 2, 3), row, np.uint8) for row in range(4)}


def retrieved(gallery_images, count):
  """Return galleries of four images with indices from 10, two captions each, one wrong."""
  vectors = np.eye(4, dtype=np.float32)
  owner = np.repeat(np.arange(4), 2)
  texts = vectors[[0, 0, 1, 3, 2, 2, 3, 3]]
  images = ov_eval.Collected(vectors, index=np.arange(10, 14), columns={})
  captions = [f"caption {number}" for number in range(8)]
  found = ov_eval.retrieval(vectors, texts, owner)
  pairs = np.stack([np.arange(8), owner], 1)
  return clip_gallery.retrieved(images, texts, captions, pairs, found, gallery_images, count)


def test_rows_are_first_and_worst_queries():
  by_text, by_image, worst = retrieved(IMAGES, 2)
  assert [row.query for row in by_text.rows] == ["caption 0", "caption 1"]
  assert by_text.rows[0].rank == 1
  best = by_text.rows[0].found[0]
  assert best.right and best.score == 1
  np.testing.assert_array_equal(best.image, IMAGES[10])
  np.testing.assert_array_equal(by_image.rows[1].query, IMAGES[11])
  assert by_image.rows[1].text == by_image.rows[1].found[0].text == "caption 2"
  assert worst.rows[0].query == "caption 3" and not worst.rows[0].found[0].right


def test_no_rows():
  assert [gallery.rows for gallery in retrieved(IMAGES, 0)] == [(), (), ()]


def test_first_images_on_another_process():
  """Occurs with two processes and batches more than twice as large as the gallery."""
  by_text, by_image, _ = retrieved({12: IMAGES[12], 13: IMAGES[13]}, 2)
  assert by_image.rows == ()
  assert len(by_text.rows) == 2 and by_text.rows[0].found[0].image is None
