"""Tests of retrieval against brute force: ties, numbers of captions, blocks, memory."""

import itertools
import math
import re
import resource

import jax
import numpy as np
import pytest

from ov_eval.retrieval import QueryRanks, _count_block, retrieval, top_retrieved

KS = (1, 5, 10)


def _unit(rows):
  return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def _case(seed, num_images=60, width=16, noise=1.5, max_texts=5):
  """Return images, texts and owners in random order; 0 to `max_texts` texts per image."""
  rng = np.random.default_rng(seed)
  images = _unit(rng.normal(size=(num_images, width)))
  owner = rng.permutation(np.repeat(np.arange(num_images), rng.integers(0, max_texts, num_images)))
  texts = _unit(images[owner] + noise * rng.normal(size=(len(owner), width)) / width**0.5)
  return images, texts, owner


def _order_of_sorting(images, texts, owner, k):
  """Return recalls from sorting the full score matrix, as the released OpenVision code does."""
  scores = images.astype(np.float64) @ texts.T.astype(np.float64)
  by_image, by_text = np.argsort(-scores, axis=1)[:, :k], np.argsort(-scores.T, axis=1)[:, :k]
  queries = np.unique(owner)
  img2txt = [(owner[by_image[i]] == i).any() for i in queries]
  txt2img = [owner[j] in by_text[j] for j in range(len(texts))]
  return np.mean(img2txt), np.mean(txt2img)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1, 7, 4095])
def test_recall_equals_sorting_the_full_matrix(seed, chunk):
  images, texts, owner = _case(seed, num_images=50 if chunk == 1 else 150)
  found = retrieval(images, texts, owner, ks=KS, chunk=chunk)
  for k in KS:
    expected = _order_of_sorting(images, texts, owner, k)
    got = found.img2txt.recall(k).value, found.txt2img.recall(k).value
    assert got == pytest.approx(expected, abs=1e-12)
  assert 0.05 < found.txt2img.recall(1).value < found.txt2img.recall(10).value < 1
  scores = images @ texts.T
  best = [(scores[i] > scores[i, owner == i].max()).sum() + 1 for i in found.img2txt.queries]
  np.testing.assert_array_equal(found.img2txt.expected_rank, best)
  medians = {r.name: r for r in found.results() if "median" in r.name}
  assert medians["img2txt_median_rank"].value == np.median(best)
  assert (
    medians["img2txt_median_rank"].low <= np.median(best) <= medians["img2txt_median_rank"].high
  )


def _mean_over_orders(scores, right, k):
  """Return hits among the first k and the rank of the first hit, averaged over all orders."""
  hits, ranks = [], []
  for order in itertools.permutations(range(len(scores))):
    ranked = sorted(order, key=lambda c: -scores[c])  # stable: ties keep this order
    first = min(ranked.index(c) for c in right)
    hits.append(first < k)
    ranks.append(first + 1)
  return np.mean(hits), np.mean(ranks)


@pytest.mark.parametrize("seed", range(3))
def test_ties_are_averaged_over_all_orders(seed):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 2, (4, 2)).astype(np.float32)  # scores 0, 1 or 2: most are tied
  texts = rng.integers(0, 2, (6, 2)).astype(np.float32)
  images[0] = texts[0] = 1
  owner = np.array([0, 0, 1, 3, 3, 3])
  found = retrieval(images, texts, owner)
  scores = images @ texts.T
  for k in (1, 2, 3):
    orders = [_mean_over_orders(scores[i], np.flatnonzero(owner == i), k) for i in (0, 1, 3)]
    np.testing.assert_allclose(found.img2txt.hits(k), [hit for hit, _ in orders], atol=1e-12)
    np.testing.assert_allclose(found.img2txt.expected_rank, [rank for _, rank in orders])
    orders = [_mean_over_orders(scores[:, j], [owner[j]], k) for j in range(6)]
    np.testing.assert_allclose(found.txt2img.hits(k), [hit for hit, _ in orders], atol=1e-12)
    np.testing.assert_allclose(found.txt2img.expected_rank, [rank for _, rank in orders])


@pytest.mark.parametrize("width", [3, 512, 1024])
@pytest.mark.parametrize("texts_first", [False, True])
def test_constant_model_scores_chance(width, texts_first):
  vector = _unit(np.random.default_rng(0).normal(size=width))
  owner = np.repeat(np.arange(25), 4)
  owner = owner[::-1] if texts_first else owner
  found = retrieval(np.tile(vector, (25, 1)), np.tile(vector, (100, 1)), owner, chunk=3)
  assert found.img2txt.recall(1).value == pytest.approx(1 / 25)
  assert found.txt2img.recall(1).value == pytest.approx(1 / 25)
  assert found.txt2img.recall(10).value == pytest.approx(10 / 25)
  assert found.txt2img.median("m").value == 13.0


def test_duplicated_texts_share_the_hit():
  # Every second caption repeats the one before, so a perfect model gets one of two right.
  images = _unit(np.random.default_rng(0).normal(size=(20, 64)))
  found = retrieval(images, np.repeat(images[::2], 2, axis=0), np.arange(20))
  assert found.img2txt.hits(1)[::2] == pytest.approx(0.5)
  assert found.txt2img.recall(1).value == 0.5  # the copies belong to the other image


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [2, 9])
def test_several_correct_images_per_text(seed, most):
  rng = np.random.default_rng(seed)
  images = _unit(rng.normal(size=(70, 12)))
  # `most` limits the texts of an image or the images of a text, so both forms of links occur.
  sizes = rng.integers(1, most + 1, 40)
  pairs = np.array([[text, image] for text in range(40) for image in rng.choice(60, sizes[text])])
  if most == 9:
    pairs = np.concatenate([pairs, [[text, 0] for text in range(40)]])
  texts = np.stack([images[pairs[pairs[:, 0] == text, 1]].mean(0) for text in range(40)])
  texts = _unit(texts + 0.2 * rng.normal(size=texts.shape))
  pairs = rng.permutation(np.concatenate([pairs, pairs[:5]]))  # repeated pairs count once
  found = retrieval(images, texts, pairs, chunk=16)
  scores = images.astype(np.float64) @ texts.T
  right = np.zeros(scores.shape, bool)
  right[pairs[:, 1], pairs[:, 0]] = True
  for ranks, table, is_right in (
    (found.img2txt, scores, right),
    (found.txt2img, scores.T, right.T),
  ):
    queries = np.flatnonzero(is_right.any(1))
    np.testing.assert_array_equal(ranks.queries, queries)
    best = [((table[q] > table[q, is_right[q]].max()) & ~is_right[q]).sum() + 1 for q in queries]
    np.testing.assert_array_equal(ranks.expected_rank, best)


def test_a_constant_model_scores_chance_with_several_correct_images():
  vector = np.ones((6, 4), np.float32)
  pairs = np.array([[0, 0], [0, 1], [1, 2]])
  found = retrieval(vector, vector[:2], pairs)
  assert found.txt2img.hits(1) == pytest.approx([2 / 6, 1 / 6])
  assert found.txt2img.hits(2) == pytest.approx([1 - 4 / 6 * 3 / 5, 2 / 6])


def test_image_without_text_is_a_candidate_but_not_a_query():
  images = np.eye(3, dtype=np.float32)
  texts = np.array([[0, 0.6, 0.8], [0, 1, 0]], np.float32)
  found = retrieval(images, texts, np.array([1, 1]))
  assert found.img2txt.queries.tolist() == [1] and found.img2txt.recall(1).count == 1
  assert found.txt2img.expected_rank.tolist() == [2, 1]  # the third image is nearer to text 0
  assert found.txt2img.worst(1).tolist() == [0]


def test_results_have_names_counts_and_intervals():
  images, texts, owner = _case(0)
  results = {r.name: r for r in retrieval(images, texts, owner, ks=(1, 3)).results()}
  assert list(results) == [
    *("img2txt_r1", "img2txt_r3", "img2txt_median_rank"),
    *("txt2img_r1", "txt2img_r3", "txt2img_median_rank"),
  ]
  assert results["img2txt_r1"].count == len(set(owner.tolist())) < len(images)
  assert results["txt2img_median_rank"].count == len(texts)
  assert all(r.low <= r.value <= r.high for r in results.values())


def test_interval_of_the_median_covers_it():
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(400):
    before = rng.geometric(0.02, 101)  # median 34.3 of the distribution, so 34 + 1 of ranks
    zeros = np.zeros_like(before)
    median = QueryRanks(zeros, before, zeros, zeros + 1).median("m")
    inside += median.low <= 36 <= median.high
  assert 0.92 < inside / 400 < 0.99  # 95% at a standard error of 1.1 points, and it is discrete


def test_no_array_is_larger_than_a_strip():
  chunk, width = 128, 8
  links = lambda n: np.zeros((n, 1), np.int32)
  rows = lambda n: (np.zeros((n, width), np.float32), links(n), *np.zeros((2, n), "f"))
  program = jax.jit(_count_block).lower(rows(chunk), rows(8 * chunk)).as_text()
  shapes = re.findall(r"tensor<([\dx]+)x[a-z]", program)
  assert max(math.prod(map(int, shape.split("x"))) for shape in shapes) == 64 * 8 * chunk


def test_memory_is_far_below_the_full_matrix():
  num_images, num_texts = 8_000, 40_000  # their matrix: 1280 MB
  rng = np.random.default_rng(0)
  images = _unit(rng.normal(size=(num_images, 8)))
  owner = np.arange(num_texts) // 5
  retrieval(images[:100], images[:100], np.arange(100))  # one-time allocations of JAX
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  done = []
  found = retrieval(images, images[owner], owner, progress=lambda *at: done.append(at))
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < 250_000, f"{grown} kB"
  assert done[-1] == (num_images * num_texts,) * 2 and len(done) == 8 * 5
  assert found.img2txt.recall(1).value > 0.99


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(text_image=[0, 1, 3]), "contains 3, which is not a row of 3 images"),
    (dict(text_image=[0, 1, -1]), "contains -1"),
    (dict(text_image=[0, 1]), "each of 3 texts"),
    (dict(text_image=[[0, 1, 2]]), r"pairs \[P, 2\]"),
    (dict(text_image=[[0, 1], [3, 2]]), "contains 3, which is not a row of 3 texts"),
    (dict(text_image=[[0, 0], [2, 2]]), "text 1 has no image"),
    (dict(texts=np.ones((3, 5))), "same width"),
    (dict(texts=np.ones((0, 4))), "at least one row"),
    (dict(images=np.array([[1, np.nan, 0, 0]] * 3)), "3 of 3 images"),
    (dict(ks=(0, 1)), "ks"),
    (dict(chunk=4096), "between 1 and 4095"),
  ],
)
def test_invalid_arguments(change, message):
  arguments = {"images": np.eye(3, 4), "texts": np.eye(3, 4), "text_image": [0, 1, 2], **change}
  with pytest.raises(ValueError, match=message):
    retrieval(**arguments)


def test_top_retrieved_agrees_with_retrieval():
  images, texts, owner = _case(5, num_images=80)
  found = retrieval(images, texts, owner)
  rows = found.txt2img.worst(6)
  shown = top_retrieved(texts[rows], images, [[owner[j]] for j in rows], k=4)
  for j, hit in zip(rows, shown, strict=True):
    scores = images @ texts[j]
    assert list(hit.found) == np.argsort(-scores, kind="stable")[:4].tolist()
    assert hit.right == tuple(i == owner[j] for i in hit.found)
    assert hit.scores == pytest.approx(np.sort(scores)[::-1][:4])
    assert hit.rank == found.txt2img.expected_rank[j]
  assert shown[0].rank == found.txt2img.expected_rank.max()
  right = [np.flatnonzero(owner == i).tolist() for i in range(len(images))]
  ranks = {i: hit.rank for i, hit in enumerate(top_retrieved(images, texts, right, k=1))}
  assert all(ranks[i] is None for i in range(len(images)) if not right[i])
  np.testing.assert_array_equal(
    [ranks[i] for i in found.img2txt.queries], found.img2txt.expected_rank
  )


def test_top_retrieved_ties():
  (hit,) = top_retrieved(np.ones((1, 2)), np.ones((5, 2)), [{4}], k=9)
  assert hit.found == (0, 1, 2, 3, 4) and hit.rank == 3
  with pytest.raises(ValueError, match="entries for 2 queries; expected 1"):
    top_retrieved(np.ones((1, 2)), np.ones((5, 2)), [[0], [1]])
