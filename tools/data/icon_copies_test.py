"""Tests of the detection of copied icons."""

import numpy as np
import pytest

from tools.data import icon_copies, icon_render, icon_svg

CAR = (
  '<path d="M3 13l2-6h14l2 6v6h-3v-2H6v2H3zM6 14a1 1 0 1 0 3 0a1 1 0 1 0-3 0M15 14a1 1 0 1 0 3 0a1 '
  '1 0 1 0-3 0" fill-rule="evenodd"/>'
)
STAR = '<path d="M12 2l3 7h7l-6 4l2 8l-6-5l-6 5l2-8l-6-4h7z"/>'


def vectors(*bodies):
  with icon_render.Renderer() as renderer:
    images = [renderer.render(icon_svg.document(b, 32, 0, 0, 24, 24), 32) for b in bodies]
  return [icon_copies.small_vector(image) for image in images]


def test_smaller_moved_and_coloured_copies_are_near_and_others_are_not():
  car, star, small, gray, red, tilted = vectors(
    CAR,
    STAR,
    f'<g transform="translate(2 5) scale(.7)">{CAR}</g>',
    f'<g fill="#444">{CAR}</g>',
    f'<g fill="#c33">{CAR}</g>',
    f'<g transform="rotate(90 12 12)">{CAR}</g>',
  )
  for copy in (small, gray, red):
    assert car @ copy > icon_copies.COPY_CORRELATION
  for other in (star, tilted):
    assert car @ other < 0.7


def test_a_drawing_is_compared_without_its_margins():
  square = np.full((2, 40, 40, 3), 255, np.uint8)
  square[0, 4:36, 4:36] = square[1, 10:20, 25:35] = 0
  one, other = map(icon_copies.small_vector, square)
  assert one @ other == pytest.approx(1, abs=0.02) and one @ one == pytest.approx(1)
  assert one.shape == (icon_copies.SIDE**2,) and one.sum() == pytest.approx(0, abs=1e-4)
  blank = icon_copies.small_vector(np.full((8, 8, 3), 255, np.uint8))
  assert blank.shape == one.shape and not blank.any()


def test_the_extent_includes_partly_covered_pixels():
  ink = np.zeros(20, np.uint8)
  ink[5:9] = [50, 200, 200, 100]
  assert icon_copies._extent(ink) == (5.75, 8.5)


def test_nearest_equals_the_largest_dot_product():
  rng = np.random.default_rng(0)
  queries, others = rng.normal(size=(200, 8)), rng.normal(size=(50, 8))
  rows, scores = icon_copies.nearest(queries, others)
  np.testing.assert_array_equal(rows, (queries @ others.T).argmax(1))
  np.testing.assert_allclose(scores, (queries @ others.T).max(1), rtol=1e-6)
