"""Find near-duplicates in a stream: vectors close to an earlier vector that was kept.

Only kept vectors represent the stream, so chains of small differences do not drop unrelated
records. Small collections are compared exactly. Larger ones use an HNSW graph of usearch (Malkov
and Yashunin 2016, https://arxiv.org/abs/1603.09320), which misses a few near-duplicates.
"""

import abc
from typing import Any

import numpy as np
from numpy.typing import NDArray
import usearch.index

GRAPH_FROM = 100_000  # vectors from which a graph is used
_BATCH = 1024
_COLUMNS = 8192  # kept vectors compared at a time
_GRAPH: dict[str, Any] = {"connectivity": 16, "expansion_add": 128, "expansion_search": 128}


class NearDuplicates(abc.ABC):
  """Kept vectors of a stream.

  Args:
    total: maximum number of vectors of the stream; decides whether to use a graph.
  """

  def __init__(self, total: int):
    self.is_exact = total < GRAPH_FROM
    self._graph = None if self.is_exact else self._new_graph()
    self._kept: list[NDArray[Any]] = []  # chunks of at most _COLUMNS + _BATCH vectors

  def add(self, vectors: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of the next vectors are near-duplicates, bool [n]; keep the others."""
    return np.concatenate([
      np.zeros(0, bool),
      *(self._add(vectors[at : at + _BATCH]) for at in range(0, len(vectors), _BATCH)),
    ])  # fmt: skip

  def _add(self, batch: NDArray[Any]) -> NDArray[np.bool_]:
    is_near = self._search(batch)
    rest = np.flatnonzero(~is_near)
    pairs = np.tril(self._close(batch[rest], batch[rest]), -1)
    for row, number in enumerate(rest):  # in order: a dropped vector drops no other
      earlier = rest[:row][pairs[row, :row]]
      is_near[number] = (~is_near[earlier]).any()
    self._keep(batch[~is_near])
    return is_near

  def _search(self, batch: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which vectors are close to a kept one."""
    is_near = np.zeros(len(batch), bool)
    if self._graph is None:
      for chunk in self._kept:
        is_near |= self._close(batch, chunk).any(axis=1)
    elif len(self._graph):
      found = self._graph.search(self._packed(batch), 1)
      nearest = np.asarray(found.keys).reshape(len(batch))
      is_near = self._close_pairs(batch, np.asarray(self._graph.get(nearest)))
    return is_near

  def _keep(self, vectors: NDArray[Any]) -> None:
    if self._graph is not None:
      # One thread, so that the graph and therefore the result are the same in every run.
      first = len(self._graph)
      self._graph.add(np.arange(first, first + len(vectors)), self._packed(vectors), threads=1)
    elif self._kept and len(self._kept[-1]) < _COLUMNS:
      self._kept[-1] = np.concatenate([self._kept[-1], vectors])
    else:
      self._kept.append(vectors)

  @abc.abstractmethod
  def _new_graph(self) -> Any:
    """Return an empty graph."""

  @abc.abstractmethod
  def _packed(self, vectors: NDArray[Any]) -> NDArray[Any]:
    """Return vectors as the graph stores them."""

  @abc.abstractmethod
  def _close(self, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Compare each row with each column, bool [rows, columns]."""

  @abc.abstractmethod
  def _close_pairs(self, vectors: NDArray[Any], found: NDArray[Any]) -> NDArray[np.bool_]:
    """Compare each vector with the one that the graph found for it, bool [n]."""


class NearHashes(NearDuplicates):
  """Hashes uint64 [n] with at most `distance` different bits."""

  def __init__(self, total: int, distance: int):
    if not 0 <= distance < 64:
      raise ValueError(f"distance={distance}: expected 0 to 63 bits")
    self._distance = distance
    super().__init__(total)

  def _new_graph(self) -> Any:
    return usearch.index.Index(ndim=64, metric="hamming", dtype="b1", **_GRAPH)

  def _packed(self, vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors.astype("<u8").view(np.uint8).reshape(len(vectors), 8)

  def _close(self, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.bool_]:
    return np.bitwise_count(rows[:, None] ^ columns[None, :]) <= self._distance

  def _close_pairs(self, vectors: NDArray[Any], found: NDArray[Any]) -> NDArray[np.bool_]:
    bits = np.bitwise_count(self._packed(vectors) ^ found.reshape(len(vectors), 8))
    return bits.sum(axis=1) <= self._distance


class NearEmbeddings(NearDuplicates):
  """Unit vectors float16 [n, E] whose dot product is at least `similarity`."""

  def __init__(self, total: int, similarity: float, dim: int):
    if not 0 < similarity <= 1:
      raise ValueError(f"similarity={similarity}: expected a number above 0, at most 1")
    self._similarity, self._dim = np.float32(similarity), dim
    super().__init__(total)

  def _new_graph(self) -> Any:
    return usearch.index.Index(ndim=self._dim, metric="ip", dtype="f16", **_GRAPH)

  def _packed(self, vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors

  def _close(self, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.bool_]:
    return rows.astype(np.float32) @ columns.astype(np.float32).T >= self._similarity

  def _close_pairs(self, vectors: NDArray[Any], found: NDArray[Any]) -> NDArray[np.bool_]:
    dots = (vectors.astype(np.float32) * found.astype(np.float32)).sum(axis=1)
    return dots >= self._similarity
