"""Tests of zero-shot classification: ensembles, ties, padding, repeats, batches."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_eval.classes import ClassSet, TemplateSet
from ov_eval.zero_shot import (
  Predictions,
  class_embeddings,
  classify_by_embedding,
  worst_mistakes,
)


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _encode(texts):
  """Return the bytes of the texts, zero-padded."""
  return np.array([list(text.encode().ljust(40, b"\0")) for text in texts], np.int32)


_TABLE = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)


@jax.jit
def _embed_text(ids):
  total = (jnp.asarray(_TABLE)[ids] * jnp.cos(jnp.arange(40.0))[:, None]).sum(1)
  return total / jnp.linalg.norm(total, axis=1, keepdims=True)


NAMES, TEMPLATES = ("Red Fox", "hen, of_the woods", "T-shirt"), ("{}", "a photo of a {}.")


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_class_embedding_is_the_normalised_mean(chunk):
  prompts = [
    ("red fox", "a photo of a red fox"),
    ("hen, of the woods", "a photo of a hen, of the woods"),
    ("tshirt", "a photo of a tshirt"),
  ]
  expected = [
    _unit(np.mean([np.asarray(_embed_text(_encode([text])))[0] for text in some], axis=0))
    for some in prompts
  ]
  sets = (NAMES, TEMPLATES), (ClassSet("c", NAMES), TemplateSet("t", TEMPLATES))
  for classes, templates in sets:
    found = class_embeddings(_embed_text, _encode, classes, templates, chunk=chunk)
    chex.assert_shape(found, (3, 8))
    chex.assert_type(found, np.float32)
    # Sums of 40 float32 products whose order depends on the chunk: a few units of 6e-8.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_templates_have_equal_weight():
  # Two templates agree and one does not; the mean is taken before normalisation.
  vectors = {"a": [1, 0], "x a": [1, 0], "y a": [0, 1], "b": [0, 1], "x b": [0, -1], "y b": [1, 0]}
  embed = lambda ids: np.array([vectors[bytes(row).rstrip(b"\0").decode()] for row in ids.tolist()])
  found = class_embeddings(embed, _encode, ["a", "b"], ["{}", "x {}", "y {}"], chunk=2)
  np.testing.assert_allclose(found, [[2 / 5**0.5, 1 / 5**0.5], [1, 0]], atol=1e-6)


def test_templates_that_cancel_give_zero():
  embed = lambda ids: np.where(ids[:, :1] == ord("a"), 1.0, -1.0) * np.array([1.0, 0.0])
  found = class_embeddings(embed, _encode, ["b", "c"], ["{}", "a {}"])
  np.testing.assert_array_equal(found, np.zeros((2, 2)))  # and not NaN


def test_canonical_texts_can_be_left_to_the_tokenizer():
  seen = []
  encode = lambda texts: seen.extend(texts) or _encode(texts)
  class_embeddings(_embed_text, encode, NAMES, TEMPLATES, chunk=2, canonical=False)
  assert seen[1] == "a photo of a Red Fox." and seen[4] == "T-shirt"


def test_vectors_must_have_unit_norm():
  with pytest.raises(ValueError, match="a vector of norm 3; it must return unit vectors"):
    class_embeddings(lambda ids: 3 * _embed_text(ids), _encode, NAMES, TEMPLATES)


def _case(seed=0, num_examples=61, num_classes=11, width=6):
  """Return integer vectors, so that scores are exact and often tied."""
  rng = np.random.default_rng(seed)
  vectors = rng.integers(-1, 2, (num_examples, width)).astype(np.float32)
  matrix = rng.integers(-1, 2, (num_classes, width)).astype(np.float32)
  labels = rng.integers(0, num_classes, num_examples)
  return vectors, matrix, labels


def _batches(vectors, labels, rows, size):
  """Return batches of these rows; the last is padded with garbage that must be ignored."""
  for start in range(0, len(rows), size):
    some = np.asarray(rows[start : start + size])
    fill = size - len(some)
    yield {
      "vector": np.concatenate([vectors[some], np.full((fill, vectors.shape[1]), np.nan, "f")]),
      "label": np.append(labels[some], np.full(fill, -1)),
      "index": np.append(some, np.full(fill, rows[0])),
      "valid": np.arange(size) < len(some),
    }


def _embed(batch):
  return jnp.asarray(batch["vector"])


def _brute_force(scores, labels):
  """Return the classes of each row, sorted by score and then by number."""
  order = [sorted(range(scores.shape[1]), key=lambda c: (-row[c], c)) for row in scores.tolist()]
  return np.array([list(o).index(label) for o, label in zip(order, labels, strict=True)]), order


@pytest.mark.parametrize("size", [1, 8, 61, 100])
@pytest.mark.parametrize("seed", range(2))
def test_equals_brute_force(seed, size):
  vectors, matrix, labels = _case(seed)
  shuffled = np.random.default_rng(seed + 7).permutation(61)
  rows = [*shuffled, *shuffled[:9]]  # nine repeats
  reported = []
  batches = list(_batches(vectors, labels, rows, size))
  found, predictions = classify_by_embedding(
    _embed, matrix, batches, progress=lambda *at: reported.append(at)
  )
  scores = vectors @ matrix.T
  assert sum(len(set(row)) < len(row) for row in scores.tolist()) > 50  # most have ties
  rank, order = _brute_force(scores, labels)
  assert found.top1.value == np.mean(rank == 0) and found.top5.value == np.mean(rank < 5)
  assert found.top1.count == 61 == found.confusion.counts.sum()
  predicted = np.array([o[0] for o in order])
  confusion = np.zeros((11, 11), int)
  np.add.at(confusion, (labels, predicted), 1)
  np.testing.assert_array_equal(found.confusion.counts, confusion)
  per_class = [np.mean(rank[labels == c] == 0) for c in range(11) if (labels == c).any()]
  assert found.confusion.mean_per_class() == pytest.approx(np.mean(per_class), abs=1e-15)

  np.testing.assert_array_equal(predictions.index, np.arange(61))
  np.testing.assert_array_equal(predictions.label, labels)
  np.testing.assert_array_equal(predictions.predicted, predicted)
  np.testing.assert_array_equal(predictions.rank, rank)
  np.testing.assert_array_equal(predictions.score, scores.max(1))
  np.testing.assert_array_equal(predictions.label_score, scores[np.arange(61), labels])
  assert reported[-1] == (len(batches), len(batches))


def test_batch_size_does_not_change_scores():
  rng = np.random.default_rng(3)
  vectors = _unit(rng.normal(size=(50, 64))).astype(np.float32)
  matrix = _unit(rng.normal(size=(300, 64))).astype(np.float32)
  matrix[200] = matrix[7]  # two classes with equal texts
  labels = rng.integers(0, 300, 50)
  vectors[:5] = matrix[7]
  labels[:5] = [7, 200, 7, 200, 9]
  whole, answers = classify_by_embedding(_embed, matrix, _batches(vectors, labels, range(50), 50))
  assert answers.predicted[:5].tolist() == [7] * 5 and answers.rank[:4].tolist() == [0, 1, 0, 1]
  for size in (1, 3, 16):
    parts, others = classify_by_embedding(
      _embed, matrix, _batches(vectors, labels, range(50), size)
    )
    assert (parts.top1, parts.top5) == (whole.top1, whole.top5)
    assert others.records() == answers.records()


def test_constant_model_scores_chance():
  labels = np.arange(20) % 10
  batches = _batches(np.ones((20, 4), np.float32), labels, range(20), 8)
  found, _ = classify_by_embedding(_embed, np.ones((10, 4)), batches)
  assert (found.top1.value, found.top5.value) == (0.1, 0.5)
  assert found.confusion.mean_per_class() == 0.1


def test_repeats_across_processes_count_once():
  vectors, matrix, labels = _case()
  parts = []

  def keep(value):
    parts.append(value)
    return [value]

  for rows in (range(40), range(35, 61), []):  # five rows on two processes; one process has none
    classify_by_embedding(_embed, matrix, _batches(vectors, labels, rows, 8), gather=keep)
  found, predictions = classify_by_embedding(_embed, matrix, [], gather=lambda mine: [*parts, mine])
  whole, all_of_them = classify_by_embedding(
    _embed, matrix, _batches(vectors, labels, range(61), 8)
  )
  assert (found.top1, found.top5) == (whole.top1, whole.top5)
  np.testing.assert_array_equal(found.confusion.counts, whole.confusion.counts)
  assert predictions.records() == all_of_them.records()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"label": np.array([0, 4, 1])}, r"label 4 is not in \[0, 4\)"),
    ({"label": np.array([0, -1, 1])}, r"label -1 is not in"),
    ({"vector": np.array([[1, 0], [np.nan, 0], [0, 1]])}, "1 examples have NaN class scores"),
    ({"index": np.array([5, 6, 5])}, "index 5 has two labels"),
  ],
)
def test_invalid_batches(change, message):
  batch = {"vector": np.ones((3, 2)), "label": np.arange(3), "index": np.arange(3)}
  batch = {**batch, "valid": np.ones(3, bool), **change}
  with pytest.raises(ValueError, match=message):
    classify_by_embedding(_embed, np.ones((4, 2)), [batch])


def _predictions():
  return Predictions(
    index=np.array([4, 5, 6, 7, 8]),
    label=np.array([0, 1, 0, 1, 1]),
    predicted=np.array([0, 0, 1, 0, 0]),
    rank=np.array([0, 1, 1, 1, 1]),
    score=np.array([0.9, 0.5, 0.6, 0.75, 0.5], np.float32),
    label_score=np.array([0.9, 0.25, 0.5, 0.0, 0.25], np.float32),
  )


def test_worst_mistakes_are_sorted_and_wrong():
  worst = worst_mistakes(_predictions())
  assert worst.index.tolist() == [7, 5, 8, 6]  # ties in order of index
  assert worst_mistakes(_predictions(), 2).index.tolist() == [7, 5]
  assert len(worst_mistakes(_predictions()[:1])) == 0


def test_records_are_plain_json():
  (record,) = _predictions()[1:2].records(("cat", "dog"))
  assert json.loads(json.dumps(record)) == {
    "index": 5, "label": 1, "predicted": 0, "rank": 1, "score": 0.5, "label_score": 0.25,
    "label_name": "dog", "predicted_name": "cat",
  }  # fmt: skip
  assert "label_name" not in _predictions().records()[0]
  assert _predictions()[1:2].records(ClassSet("pets", ("cat", "dog"))) == [record]
