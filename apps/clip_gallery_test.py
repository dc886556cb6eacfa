"""Galleries of two towers: what stands in them, and that there may be nothing to show."""

import numpy as np

from apps import clip_gallery
import ov_eval

PICTURES = {10 + row: np.full((2, 2, 3), row, np.uint8) for row in range(4)}


def retrieved(pictures, count):
  """Four pictures, the index of the first is 10; two captions of each, of which one is wrong."""
  vectors = np.eye(4, dtype=np.float32)
  owner = np.repeat(np.arange(4), 2)
  texts = vectors[[0, 0, 1, 3, 2, 2, 3, 3]]
  images = ov_eval.Collected(vectors, index=np.arange(10, 14), columns={})
  captions = [f"caption {number}" for number in range(8)]
  found = ov_eval.retrieval(vectors, texts, owner)
  return clip_gallery.retrieved(images, texts, captions, owner, found, pictures, count)


def test_rows_are_the_first_queries_and_the_worst():
  by_text, by_picture, worst = retrieved(PICTURES, 2)
  assert [row.query for row in by_text.rows] == ["caption 0", "caption 1"]
  assert by_text.rows[0].rank == 1
  best = by_text.rows[0].found[0]
  assert best.right and best.score == 1
  np.testing.assert_array_equal(best.image, PICTURES[10])
  np.testing.assert_array_equal(by_picture.rows[1].query, PICTURES[11])
  assert by_picture.rows[1].text == by_picture.rows[1].found[0].text == "caption 2"
  assert worst.rows[0].query == "caption 3" and not worst.rows[0].found[0].right


def test_no_rows_are_asked_for():
  assert [gallery.rows for gallery in retrieved(PICTURES, 0)] == [(), (), ()]


def test_another_process_read_the_first_pictures():
  """As with two processes and batches of more than twice as many pictures as are shown."""
  by_text, by_picture, _ = retrieved({12: PICTURES[12], 13: PICTURES[13]}, 2)
  assert by_picture.rows == ()
  assert len(by_text.rows) == 2 and by_text.rows[0].found[0].image is None
