"""Balance records by groups: matches of queries in their texts, or clusters of their embeddings.

As in MetaCLIP (https://arxiv.org/abs/2309.16671), each group keeps each of its records with the
probability min(1, limit / size), and a record is kept if any of its groups keeps it. The draws are
a function of seed, record and group, so they do not depend on the order of the records.

A query matches a text if its words follow each other in the text. Words are runs of letters and
digits, without regard to case and compatibility forms (NFKC); each Chinese and Japanese character
is a word, because these texts have no spaces.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any, Protocol
import unicodedata

import numpy as np
from numpy.typing import NDArray

from ov_data import fs, hashing

_DRAW_SALT, _SAMPLE_SALT, _START_SALT = 1, 2, 3
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_MAX_QUERY_BYTES = 1 << 30
_SAMPLES = 256  # embeddings per cluster that k-means reads
_ITERATIONS = 20
_CHUNK = 8192  # embeddings compared with all centers at a time
_LARGEST = 5  # groups in the report

Columns = Mapping[str, Any]
Members = tuple[NDArray[np.int64], NDArray[np.int64]]  # row and group of each membership, [m]


class Groups(Protocol):
  """Assignment of records to groups.

  Attributes:
    column: column that it reads.
    unit: name of one group, such as "query".
    size: number of groups.
  """

  column: str
  unit: str
  size: int

  def members(self, columns: Columns, kept: NDArray[np.bool_]) -> Members:
    """Return the memberships of the kept rows of a shard."""

  def name(self, group: int) -> str:
    """Return the name of a group for reports."""


class Queries:
  """Groups of the records whose texts match a query.

  Args:
    queries: the queries; equal ones are one group, and those without words are ignored.
    column: column of lists of texts.

  Attributes:
    ignored: number of queries without words.

  Raises:
    ValueError: if no query has words.
  """

  unit = "query"

  def __init__(self, queries: Iterable[str], column: str):
    self.column = column
    self.ignored = 0
    self._groups: dict[str, int] = {}
    lengths = set()
    for query in queries:
      words = words_of(query)
      if words:
        self._groups.setdefault(" ".join(words), len(self._groups))
        lengths.add(len(words))
      else:
        self.ignored += 1
    if not self._groups:
      raise ValueError("there is no query with letters or digits; expected one query per line")
    self._lengths = sorted(lengths)
    self._names = [*self._groups]
    self.size = len(self._names)

  def name(self, group: int) -> str:
    """Return the words of a query."""
    return repr(self._names[group])

  def matches(self, texts: Iterable[str]) -> list[int]:
    """Return the numbers of the queries that match any of the texts, in order."""
    found = set()
    for text in texts:
      words = words_of(text)
      for length in self._lengths:
        for first in range(len(words) - length + 1):
          group = self._groups.get(" ".join(words[first : first + length]))
          if group is not None:
            found.add(group)
    return sorted(found)

  def members(self, columns: Columns, kept: NDArray[np.bool_]) -> Members:
    """See `Groups`."""
    rows: list[int] = []
    groups: list[int] = []
    for row in np.flatnonzero(kept).tolist():
      found = self.matches(columns[self.column][row] or ())
      rows += [row] * len(found)
      groups += found
    return np.array(rows, np.int64), np.array(groups, np.int64)


class Clusters:
  """Groups of the records with the same nearest center.

  Args:
    centers: unit vectors [K, E].
  """

  unit, column = "cluster", "image_embedding"

  def __init__(self, centers: NDArray[np.float32]):
    self._centers, self.size = centers, len(centers)

  def name(self, group: int) -> str:
    """Return the number of a cluster."""
    return str(group)

  def members(self, columns: Columns, kept: NDArray[np.bool_]) -> Members:
    """See `Groups`."""
    rows = np.flatnonzero(kept)
    return rows, nearest(columns[self.column][rows], self._centers)


@dataclasses.dataclass(frozen=True)
class Report:
  """Statistics of a balancing.

  Attributes:
    unit: name of one group.
    groups: number of groups.
    ignored: number of unusable groups.
    limit: number of records that a group keeps on average.
    before: number of records of each group before, [K].
    after: number of its records that are kept, by any group, [K].
    names: names of the largest groups by number.
  """

  unit: str
  groups: int
  ignored: int
  limit: int
  before: NDArray[np.int64]
  after: NDArray[np.int64]
  names: Mapping[int, str]

  def __str__(self) -> str:
    used = int((self.before > 0).sum())
    above = int((self.before > self.limit).sum())
    ignored = f"; {self.ignored:,} without letters or digits ignored" if self.ignored else ""
    lines = [
      f"{self.unit} groups: {self.groups:,}, of which {used:,} have records, and {above:,} more "
      f"than {self.limit:,}{ignored}"
    ]
    for group, name in self.names.items():
      lines.append(f"  {name}: {self.before[group]:,} records, {self.after[group]:,} kept")
    return "\n".join(lines)


def report(
  groups: Groups, limit: int, before: NDArray[np.int64], after: NDArray[np.int64]
) -> Report:
  """Return the statistics of a balancing; see `Report`."""
  largest = np.argsort(-before, kind="stable")[:_LARGEST].tolist()
  names = {group: groups.name(group) for group in largest if before[group]}
  return Report(
    groups.unit, groups.size, getattr(groups, "ignored", 0), limit, before, after, names
  )


def words_of(text: str) -> list[str]:
  """Return the words of a text, see the module."""
  return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def read_queries(path: str) -> list[str]:
  """Read one query per line from a UTF-8 file; empty lines are ignored.

  Raises:
    ValueError: if the file is missing, too large, or not UTF-8.
  """
  try:
    text = fs.read_regular(path, _MAX_QUERY_BYTES).decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} is not usable ({error}); expected a UTF-8 file with one query per line"
    ) from None
  return [line for line in text.splitlines() if line.strip()]


def drawn(
  seed: int,
  records: NDArray[np.int64],
  groups: NDArray[np.int64],
  sizes: NDArray[np.int64],
  limit: int,
) -> NDArray[np.bool_]:
  """Return which memberships keep their record, bool [m].

  Args:
    seed: seed of the draws.
    records: record of each membership, [m].
    groups: group of each membership, [m].
    sizes: number of records of each group, [K].
    limit: number of records that a group keeps on average.
  """
  if not len(records):
    return np.zeros(0, bool)
  draw = (hashing.keys(seed, _DRAW_SALT, records, groups) >> np.uint64(11)) * 2.0**-53
  return draw < limit / np.maximum(sizes[groups], 1)


def is_sampled(seed: int, records: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
  """Return a sample of records that contains each with the probability `fraction`, bool [n]."""
  draw = (hashing.keys(seed, _SAMPLE_SALT, records) >> np.uint64(11)) * 2.0**-53
  return draw < fraction


def sample_fraction(clusters: int, records: int) -> float:
  """Return the fraction of the records that `centers_of` needs."""
  return min(1.0, _SAMPLES * clusters / max(1, records))


def centers_of(
  vectors: NDArray[np.floating[Any]], clusters: int, seed: int,
  progress: Callable[[int], object] = lambda _: None,
) -> NDArray[np.float32]:  # fmt: skip
  """Return the centers of spherical k-means, unit vectors [K, E].

  https://doi.org/10.1023/A:1007612920971

  Args:
    vectors: unit vectors [n, E].
    clusters: number K of clusters; empty clusters keep their last center.
    seed: seed of the first centers, which are K of the vectors.
    progress: called with 1 after each iteration.

  Raises:
    ValueError: if there are fewer vectors than clusters.
  """
  if len(vectors) < clusters:
    raise ValueError(
      f"balance_clusters={clusters:,}, but only {len(vectors):,} records are left; use fewer"
    )
  order = np.argsort(hashing.keys(seed, _START_SALT, np.arange(len(vectors))))
  centers = vectors[order[:clusters]].astype(np.float32)
  assigned = np.full(len(vectors), -1)
  for _ in range(_ITERATIONS):
    before, assigned = assigned, nearest(vectors, centers)
    if (assigned == before).all():
      break
    sums = np.zeros(centers.shape, np.float64)
    np.add.at(sums, assigned, vectors)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    centers = np.where(norms > 0, sums / np.maximum(norms, 1e-30), centers).astype(np.float32)
    progress(1)
  return centers


def nearest(vectors: NDArray[np.floating[Any]], centers: NDArray[np.float32]) -> NDArray[np.int64]:
  """Return the center with the largest dot product with each vector, [n]; the first of equals."""
  parts: Sequence[NDArray[np.int64]] = [
    (vectors[first : first + _CHUNK].astype(np.float32) @ centers.T).argmax(axis=1)
    for first in range(0, len(vectors), _CHUNK)
  ]
  return np.concatenate([*parts, np.zeros(0, np.int64)])
