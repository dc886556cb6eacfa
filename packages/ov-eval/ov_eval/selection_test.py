"""Tests of selection metrics against loops over instances."""

import numpy as np
import pytest

from ov_eval.selection import jaccard, select_pairs


def _naive(images, texts):
  """Return the fractions of instances with right images, right texts and both."""
  rows = []
  for vectors, captions in zip(images, texts, strict=True):
    count = min(len(vectors), len(captions))
    text = all(
      vectors[i] @ captions[i] > vectors[i] @ captions[j]
      for i in range(count)
      for j in range(len(captions))
      if j != i
    )
    image = all(
      captions[i] @ vectors[i] > captions[i] @ vectors[j]
      for i in range(count)
      for j in range(len(vectors))
      if j != i
    )
    rows.append((image, text, image and text))
  return np.mean(rows, axis=0)


@pytest.mark.parametrize("num_images, num_texts", [(1, 2), (2, 2), (3, 2)])
def test_equals_a_loop(num_images, num_texts):
  rng = np.random.default_rng(num_images)
  images = rng.normal(size=(300, num_images, 4))
  texts = rng.normal(size=(300, num_texts, 4))
  texts[:, :num_images] += images[:, :num_texts]
  found = select_pairs(images, texts)
  expected = _naive(images, texts)
  assert [found.image.value, found.text.value, found.both.value] == pytest.approx(expected)
  assert 0.1 < found.both.value < 0.9 and found.both.count == 300
  if num_images == 1:
    assert found.image.value == 1


def test_a_constant_embedding_is_always_wrong():
  found = select_pairs(np.ones((5, 1, 3)), np.ones((5, 2, 3)))
  assert found.text.value == 0 and found.both.value == 0


def test_jaccard():
  targets = np.array([0, 1, 0, 1, 1])
  assert jaccard(np.array([0.1, 0.9, 0.2, 0.8, 0.7]), targets) == 1
  assert jaccard(np.array([0.9, 0.1, 0.8, 0.7, 0.2]), targets) == 1 / 5  # 0, 2, 3 of 1, 3, 4
  assert jaccard(np.array([0.9, 0.1, 0.8, 0.0, 0.0]), np.array([0, 0, 0, 1, 0])) == 0


def test_errors():
  with pytest.raises(ValueError, match=r"images \(2, 3\)"):
    select_pairs(np.zeros((2, 3)), np.zeros((2, 2, 3)))
