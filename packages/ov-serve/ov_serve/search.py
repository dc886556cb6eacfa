"""Nearest neighbours by the dot product: exact, or with an HNSW graph of usearch.

HNSW: Malkov and Yashunin 2016, https://arxiv.org/abs/1603.09320.
"""

import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
import usearch.index

GRAPH_FROM = 100_000  # vectors from which a graph is built by default
_CONNECTIVITY = 16
_EXPANSION_ADD = 128
_EXPANSION_SEARCH = 128
_RECALL_QUERIES = 256

Found = tuple[NDArray[np.int64], NDArray[np.float32]]  # rows and scores [Q, k]


def exact(vectors: NDArray[np.float16], queries: NDArray[np.float16], k: int) -> Found:
  """Compare every query [Q, E] with every vector [N, E]; k is at most N."""
  matches = usearch.index.search(vectors, queries, k, usearch.index.MetricKind.IP, exact=True)
  return _found(matches, len(queries), k)


def with_graph(graph: Any, queries: NDArray[np.float16], k: int) -> Found:
  """Search approximately in a graph."""
  return _found(graph.search(queries, k), len(queries), k)


def build_graph(vectors: NDArray[np.float16], *, threads: int = 1) -> Any:
  """Build the graph of vectors [N, E]. With one thread the result is always the same."""
  graph = _empty(vectors.shape[1])
  graph.add(np.arange(len(vectors)), np.asarray(vectors), threads=threads)
  return graph


def load_graph(file: pathlib.Path, count: int, dim: int) -> Any:
  """Map a graph from a file.

  Raises:
    ValueError: if the file is damaged or belongs to other vectors.
  """
  graph = _empty(dim)
  try:
    graph.view(str(file))
  except (ValueError, RuntimeError) as error:
    raise ValueError(f"{file} is damaged: {error}; embed the images again") from None
  if len(graph) != count or graph.ndim != dim:
    raise ValueError(f"{file} does not belong to the vectors next to it; embed the images again")
  return graph


def recall(graph: Any, vectors: NDArray[np.float16], k: int = 10) -> float:
  """Return the fraction of the k nearest vectors that a graph finds, for evenly spaced queries.

  Queries are vectors of the collection. Each finds itself, so k + 1 neighbours are compared without
  the query.
  """
  step = max(1, len(vectors) // _RECALL_QUERIES)
  rows = np.arange(0, len(vectors), step)[:_RECALL_QUERIES]
  queries, k = np.asarray(vectors[rows]), min(k + 1, len(vectors))
  right, found = exact(vectors, queries, k)[0], with_graph(graph, queries, k)[0]
  pairs = [
    ({*want.tolist()} - {row}, {*have.tolist()} - {row})
    for row, want, have in zip(rows.tolist(), right, found, strict=True)
  ]
  return sum(len(want & have) for want, have in pairs) / max(1, sum(len(want) for want, _ in pairs))


def _empty(dim: int) -> Any:
  return usearch.index.Index(
    ndim=dim, metric="ip", dtype="f16", connectivity=_CONNECTIVITY,
    expansion_add=_EXPANSION_ADD, expansion_search=_EXPANSION_SEARCH,
  )  # fmt: skip


def _found(matches: Any, queries: int, k: int) -> Found:
  rows = np.asarray(matches.keys).astype(np.int64).reshape(queries, -1)[:, :k]
  scores = 1 - np.asarray(matches.distances, np.float32).reshape(queries, -1)[:, :k]
  return rows, scores
