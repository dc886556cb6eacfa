"""Tests of the accuracy of embeddings, against formulas with loops."""

import json

import numpy as np
import pytest

from ov_convert import accuracy


def embeddings(rows: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)


def measured(arrays, bar=0.9, agreement_bar=0.0):
  return accuracy.measure(
    arrays, weights="int8", bar=bar, sizes=(100, 40), speed={"image": 2.0},
    agreement_bar=agreement_bar,
  )  # fmt: skip


def noisy(x, amount, seed):
  return x + amount * np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)


def cosine(x, y):
  return sum(map(float.__mul__, x, y)) / (sum(v * v for v in x) * sum(v * v for v in y)) ** 0.5


def test_cosines_and_overlap_equal_the_formulas():
  image, text = embeddings(30, 0), embeddings(7, 1)
  arrays = {"image/before": image, "text/before": text}
  arrays |= {"image/after": noisy(image, 0.3, 2), "text/after": noisy(text, 0.3, 3)}
  found = measured(arrays)
  lists = {name: a.astype(float).tolist() for name, a in arrays.items()}
  for tower in ("image", "text"):
    pairs = zip(lists[f"{tower}/before"], lists[f"{tower}/after"], strict=True)
    cosines = [cosine(x, y) for x, y in pairs]
    # float64 sums of 6 terms in another order.
    assert found.min_cosine[tower] == pytest.approx(min(cosines), abs=1e-12)
    assert found.mean_cosine[tower] == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)
  shared = []
  for number in range(7):
    near = [
      sorted(range(30), key=lambda i: -cosine(lists[f"text/{w}"][number], lists[f"image/{w}"][i]))
      for w in ("before", "after")
    ]
    shared.append(len(set(near[0][:10]) & set(near[1][:10])) / 10)
  assert found.overlap == pytest.approx(sum(shared) / 7) and 0.5 < found.overlap < 1
  classes = [
    [max(range(7), key=lambda j: cosine(lists[f"text/{w}"][j], x)) for x in lists[f"image/{w}"]]
    for w in ("before", "after")
  ]
  same = sum(a == b for a, b in zip(*classes, strict=True)) / 30
  assert found.zero_shot_agreement == pytest.approx(same) and 0.5 < same < 1
  assert "same zero-shot class of" in accuracy.summary(found)
  assert found.count == {"image": 30, "text": 7}
  assert json.loads(json.dumps(found.to_json()))["size"] == 40


def test_equal_embeddings_are_accurate():
  image = embeddings(25, 0)
  found = measured({"image/before": image, "image/after": 3 * image}, bar=0.999999)
  assert found.ok and found.overlap == 1.0


def test_few_images_have_no_overlap():
  image = embeddings(19, 0)
  assert measured({"image/before": image, "image/after": image}).overlap is None
  text = {"text/before": image, "text/after": image}
  assert measured(text).overlap is None and measured(text).ok


def test_zero_shot_agreement_requires_both_towers_and_counts_nan_as_a_change():
  image, text = embeddings(25, 0), embeddings(5, 1)
  images = {"image/before": image, "image/after": image}
  assert measured(images).zero_shot_agreement is None
  assert measured({"text/before": text, "text/after": text}).zero_shot_agreement is None
  one = {"text/before": text[:1], "text/after": text[:1]}
  assert measured(images | one).zero_shot_agreement is None
  texts = {"text/before": text, "text/after": text}
  assert measured(images | texts).zero_shot_agreement == 1.0
  broken = image.copy()
  broken[3] = np.nan
  assert measured(images | texts | {"image/after": broken}).zero_shot_agreement == 24 / 25
  assert measured(images | texts | {"text/after": text * np.nan}).zero_shot_agreement == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_without_direction_fails_any_bar(value):
  image = embeddings(25, 0)
  broken = image.copy()
  broken[3] = value
  found = measured({"image/before": image, "image/after": broken}, bar=-0.9)
  assert not found.ok and found.min_cosine["image"] == -1.0


def test_the_worst_tower_is_reported():
  image, text = embeddings(25, 0), embeddings(5, 1)
  after = text.copy()
  after[2] = -after[2]
  found = measured(
    {"image/before": image, "image/after": image, "text/before": text, "text/after": after}
  )
  assert not found.ok
  assert accuracy.explain(found) == (
    "the smallest cosine of text embeddings with int8 weights to those with float32 weights is "
    "-1.000, expected at least 0.9"
  )
  assert "40" not in accuracy.explain(found) and "image tower 2.00x" in accuracy.summary(found)


def test_an_agreement_below_its_bound_fails_although_the_cosines_are_high():
  # The image is between two texts that differ by 0.02 radians.
  image = np.tile(np.array([[1.0, 0.0]]), (4, 1))
  text = np.array([[1.0, 0.01], [1.0, -0.0101]])
  after = np.array([[1.0, 0.001]] * 3 + [[1.0, -0.001]])
  arrays = {"image/before": image, "image/after": after, "text/before": text, "text/after": text}
  assert measured(arrays, bar=0.999, agreement_bar=0.75).ok
  found = measured(arrays, bar=0.999, agreement_bar=0.8)
  assert not found.ok and found.failed == "min_agreement" and not found.to_json()["ok"]
  assert accuracy.explain(found) == (
    "the zero-shot agreement of int8 weights with float32 weights is 0.750, expected at least 0.8"
  )
  assert measured(arrays, bar=1.0, agreement_bar=0.8).failed == "min_cosine"


def test_no_embeddings_is_an_error():
  with pytest.raises(ValueError, match="expected image/before"):
    measured({})
