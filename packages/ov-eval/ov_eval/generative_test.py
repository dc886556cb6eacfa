import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ov_eval.generative import (
  Classification,
  canonicalise,
  class_prompts,
  classify_by_likelihood,
  prompts_hash,
)


@pytest.mark.parametrize(
  "text, keep, expected",
  [
    ("a bad photo of a {}.", "{}", "a bad photo of a {}"),
    ("A close-up photo of the {}!", "{}", "a closeup photo of the {}"),
    ("hen,  of_the  woods", ",", "hen, of the woods"),
    ("Jack-o'-lantern", ",", "jackolantern"),
  ],
)
def test_canonicalise(text, keep, expected):
  assert canonicalise(text, keep) == expected


def test_class_prompts():
  assert class_prompts(["T-Shirt", "long_sleeve"]) == [
    "a photo of a tshirt",
    "a photo of a long sleeve",
  ]
  with pytest.raises(ValueError, match="no {}"):
    class_prompts(["a"], "a photo")
  with pytest.raises(ValueError, match="Dress.*dress"):
    class_prompts(["Dress", "hat", "dress"])
  assert prompts_hash(["a", "b"]) != prompts_hash(["ab"])


def _case(num_examples=53, num_classes=11, ties=True, seed=0):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(num_examples, num_classes)).astype(np.float32)
  if ties:
    scores = np.round(scores * 2) / 2
  return scores, rng.integers(0, num_classes, num_examples), rng.integers(1, 6, num_classes)


def _brute_force(scores, labels):
  ranked = [sorted(range(scores.shape[1]), key=lambda c: (-row[c], c)) for row in scores]
  top = [[label in order[:k] for order, label in zip(ranked, labels, strict=True)] for k in (1, 5)]
  return np.mean(top[0]), np.mean(top[1]), [order[0] for order in ranked]


def _run(scores, labels, tokens, size, chunk, length):
  chex.clear_trace_counter()

  def batches():
    for start in range(0, len(labels), size):
      rows = np.arange(start, start + size)
      yield {
        "row": rows % len(labels),
        "label": np.where(rows < len(labels), labels[rows % len(labels)], -1),
        "valid": rows < len(labels),
      }

  @jax.jit
  @chex.assert_max_traces(n=1)
  def score(rows, ids):
    chex.assert_shape(ids, (min(chunk, 11), 2))
    classes = ids[:, 0]
    return jnp.asarray(scores)[rows][:, classes], jnp.asarray(tokens)[classes]

  prompt_ids = np.stack([np.arange(scores.shape[1])] * 2, 1)
  return classify_by_likelihood(
    lambda batch: batch["row"], score, batches(), prompt_ids, chunk=chunk, length=length
  )


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize("length", ["sum", "mean"])
def test_equals_brute_force(chunk, length):
  scores, labels, tokens = _case()
  state = _run(scores, labels, tokens, 8, chunk, length)
  judged = scores if length == "sum" else scores / tokens
  top1, top5, predicted = _brute_force(judged, labels)
  assert (state.top1.value, state.top5.value) == (pytest.approx(top1), pytest.approx(top5))
  assert state.top1.count == len(labels) == state.confusion.counts.sum()
  expected = np.zeros((11, 11), int)
  np.add.at(expected, (labels, predicted), 1)
  np.testing.assert_array_equal(state.confusion.counts, expected)


def test_length_normalisation_changes_the_answer():
  scores, labels, tokens = _case(ties=False)
  whole = _run(-np.abs(scores), labels, tokens, 8, 4, "sum")
  mean = _run(-np.abs(scores), labels, tokens, 8, 4, "mean")
  assert (whole.confusion.counts != mean.confusion.counts).any()


def test_prompts_of_a_class_are_summed():
  scores, labels, tokens = _case(num_classes=12, ties=False)
  classes = np.array([0, 1, 2, 3] * 3)
  batch = {"label": labels % 4, "valid": np.ones(len(labels), bool)}
  state = classify_by_likelihood(
    lambda batch: scores,
    lambda scores, ids: (scores[:, ids[:, 0]], tokens[ids[:, 0]]),
    [batch],
    np.arange(12)[:, None],
    classes,
    chunk=5,
  )
  likelihood = np.stack([np.exp(scores[:, classes == c]).sum(1) for c in range(4)], 1)
  assert state.top1.value == np.mean(likelihood.argmax(1) == labels % 4)
  with pytest.raises(ValueError, match="without gaps"):
    classify_by_likelihood(None, None, [], np.zeros((2, 1), int), np.array([0, 2]))


def test_constant_model_scores_chance():
  labels = np.arange(10)
  state = Classification.of(np.zeros((10, 10)), labels, np.ones(10, bool))
  assert state.top1.value == 0.1 and state.top5.value == 0.5


def test_merging():
  scores, labels, _ = _case(seed=3)
  valid = np.ones(len(labels), bool)
  whole = Classification.of(scores, labels, valid)
  parts = [Classification.of(scores[s], labels[s], valid[s]) for s in (slice(0, 50), slice(50, 53))]
  merged = parts[0] + parts[1]
  assert (merged.top1, merged.top5) == (whole.top1, whole.top5)
  np.testing.assert_array_equal(merged.confusion.counts, whole.confusion.counts)
  assert [r.name for r in whole.results()] == [
    "zero_shot_top1",
    "zero_shot_top5",
    "zero_shot_mean_per_class",
  ]


def test_invalid_labels_and_scores():
  with pytest.raises(ValueError, match=r"label 3 is not in \[0, 3\)"):
    Classification.of(np.zeros((1, 3)), np.array([3]), np.array([True]))
  with pytest.raises(ValueError, match="1 examples have NaN"):
    Classification.of(np.array([[np.nan, 0]]), np.array([0]), np.array([True]))
  with pytest.raises(ValueError, match="'median'"):
    classify_by_likelihood(None, None, [], np.zeros((2, 3), int), length="median")
