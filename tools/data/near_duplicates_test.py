import numpy as np
import pytest

from tools.data import near_duplicates
from tools.data.near_duplicates import NearEmbeddings, NearHashes


def _naive(is_close, count):
  """Keep each record unless it is close to an earlier kept one."""
  kept: list[int] = []
  near = []
  for number in range(count):
    near.append(any(is_close(number, other) for other in kept))
    if not near[-1]:
      kept.append(number)
  return near


@pytest.fixture(params=["exact", "graph"])
def search(request, monkeypatch):
  monkeypatch.setattr(near_duplicates, "GRAPH_FROM", 10**9 if request.param == "exact" else 0)
  monkeypatch.setattr(near_duplicates, "_BATCH", 16)
  monkeypatch.setattr(near_duplicates, "_COLUMNS", 50)
  return request.param


def _hashes(count):
  """Chains: each hash has 2 bits more than an earlier one, or is new."""
  random = np.random.default_rng(count)
  hashes = [int(random.integers(2**63))]
  while len(hashes) < count:
    bits = random.choice(63, 2, replace=False).tolist()
    old = hashes[random.integers(len(hashes))]
    hashes.append(old ^ (1 << bits[0] | 1 << bits[1]) if len(hashes) % 3 else
                  int(random.integers(2**63)))  # fmt: skip
  return hashes


@pytest.mark.parametrize("distance", [0, 2, 3, 5])
def test_hashes(search, distance):
  hashes = _hashes(400)
  expected = _naive(lambda a, b: (hashes[a] ^ hashes[b]).bit_count() <= distance, 400)
  near = NearHashes(400, distance)
  assert near.is_exact == (search == "exact")
  vectors = np.array(hashes, np.uint64)
  found = np.concatenate([near.add(vectors[:7]), near.add(vectors[7:7]), near.add(vectors[7:])])
  # 400 vectors are fewer than four times the candidates of a search, so the graph finds all.
  assert found.tolist() == expected


def test_embeddings(search):
  random = np.random.default_rng(0)
  centers = random.normal(size=(150, 24))
  vectors = centers[random.integers(150, size=400)] + 0.2 * random.normal(size=(400, 24))
  vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
  dots = vectors.astype(np.float64) @ vectors.astype(np.float64).T
  limit = 0.96
  assert np.abs(dots - limit).min() > 1e-7  # float32 decides all pairs like float64
  expected = _naive(lambda a, b: dots[a, b] >= limit, 400)
  found = NearEmbeddings(400, limit, 24).add(vectors)
  assert found.tolist() == expected
  assert 50 < sum(expected) < 300


@pytest.mark.parametrize("value", [-1, 64])
def test_distance_out_of_range(value):
  with pytest.raises(ValueError, match=f"distance={value}: expected 0 to 63 bits"):
    NearHashes(1, value)


@pytest.mark.parametrize("value", [0, 1.1, float("nan")])
def test_similarity_out_of_range(value):
  with pytest.raises(ValueError, match=f"similarity={value}: expected a number above 0"):
    NearEmbeddings(1, value, 4)
