import collections

import numpy as np
import pytest

from tools.data import balance
from tools.data.balance import Clusters, Queries


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("A red CAR, and a dog.", ["red car", "car", "dog"]),
    ("a redcar", []),
    ("a red-car", ["red car", "car"]),
    ("red and car", ["car"]),
    ("scar dogs", []),
    ("Café STRASSE ２", ["café", "straße", "2"]),
    ("これは犬です", ["犬"]),
    ("snake_case dog_", ["dog"]),
    ("", []),
  ],
)
def test_queries_match_words(text, found):
  queries = ["red car", "car", "dog", "café", "straße", "2", "犬"]
  groups = Queries(queries, "texts")
  assert [queries[group] for group in groups.matches([text])] == found
  assert groups.matches(["nothing", text, text]) == groups.matches([text])


def test_matches_are_those_of_a_plain_search():
  random = np.random.default_rng(0)
  words = ["a", "b", "c", "d", "ab"]
  phrase = lambda longest: " ".join(random.choice(words, random.integers(1, longest)))
  queries = sorted({phrase(4) for _ in range(40)})
  groups = Queries(queries, "texts")
  for _ in range(300):
    text = phrase(12)
    plain = [number for number, query in enumerate(queries) if f" {query} " in f" {text} "]
    assert groups.matches([text]) == plain


def test_equal_and_empty_queries():
  groups = Queries(["Dog", "dog ", "!!", "cat"], "texts")
  assert (groups.size, groups.ignored) == (2, 1) and groups.name(1) == "'cat'"
  with pytest.raises(ValueError, match="no query with letters or digits"):
    Queries(["!"], "texts")


def test_query_files(tmp_path):
  path = tmp_path / "queries.txt"
  path.write_bytes("\ufeffdog\r\n\n red car \n".encode())
  assert balance.read_queries(str(path)) == ["dog", " red car "]
  path.write_bytes(b"\xff\xfe")
  for name in ("queries.txt", "missing"):
    with pytest.raises(ValueError, match=r"is not usable .*; expected a UTF-8 file"):
      balance.read_queries(str(tmp_path / name))


def test_draws_have_the_probability_of_the_group():
  sizes = np.array([40_000, 1000, 50])
  groups = np.repeat([0, 1, 2], sizes)
  records = np.concatenate([np.arange(size) for size in sizes])
  kept = balance.drawn(7, records, groups, sizes, limit=100)
  assert kept[groups == 2].all()
  for group in (0, 1):
    # Binomial; the standard deviation is below sqrt(100) = 10, the tolerance four of them.
    assert kept[groups == group].sum() == pytest.approx(100, abs=40)
  order = np.random.default_rng(0).permutation(len(records))
  shuffled = balance.drawn(7, records[order], groups[order], sizes, limit=100)
  np.testing.assert_array_equal(shuffled, kept[order])
  assert (balance.drawn(8, records, groups, sizes, limit=100) != kept).any()
  # Draws of one record are independent between groups: 0.1 * 0.1 of 1,000 are kept twice.
  both = np.full(2, 1000)
  first, second = (balance.drawn(7, np.arange(1000), np.full(1000, g), both, 100) for g in (0, 1))
  assert (first & second).sum() < 40


def test_k_means_finds_separate_clusters():
  random = np.random.default_rng(1)
  means = np.eye(8)[:4]
  sizes = (500, 300, 40, 10)
  truth = np.repeat(np.arange(4), sizes)
  vectors = means[truth] + 0.05 * random.standard_normal((len(truth), 8))
  vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
  centers = balance.centers_of(vectors, 40, seed=0)
  found, _ = Clusters(centers).members({"image_embedding": vectors}, np.ones(len(truth), bool))
  np.testing.assert_array_equal(found, np.arange(len(truth)))
  groups = balance.nearest(vectors, centers)
  by_cluster = collections.defaultdict(set)
  for group, mean in zip(groups.tolist(), truth.tolist(), strict=True):
    by_cluster[group].add(mean)
  assert all(len(means) == 1 for means in by_cluster.values())
  np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-3)  # float16 at first
  np.testing.assert_array_equal(balance.centers_of(vectors, 40, seed=0), centers)
  plain = [max(range(40), key=lambda k: float(v @ centers[k])) for v in vectors.astype("f4")]
  # Centers that are equally near up to rounding can be swapped.
  assert (groups == plain).mean() > 0.99
  with pytest.raises(ValueError, match=r"balance_clusters=900, but only 850 records are left"):
    balance.centers_of(vectors, 900, seed=0)


def test_samples():
  records = np.arange(10_000)
  fraction = balance.sample_fraction(4, 10_000)
  assert fraction == 1024 / 10_000 and balance.sample_fraction(4, 100) == 1.0
  found = balance.is_sampled(0, records, fraction)
  # Binomial with a standard deviation of sqrt(10,000 * 0.1 * 0.9) = 30; tolerance: four of them.
  assert found.sum() == pytest.approx(1024, abs=120)
  assert balance.is_sampled(0, records, 1.0).all()
