"""Select records by their annotations: conditions, duplicates, near-duplicates and balance."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ov_data.annotations import Annotations, number_columns
from ov_data.keep_list import KeepList
from tools.data import conditions
from tools.data.balance import (
  Clusters,
  Groups,
  Queries,
  Report,
  centers_of,
  drawn,
  is_sampled,
  report,
  sample_fraction,
)
from tools.data.near_duplicates import NearDuplicates, NearEmbeddings, NearHashes

_KEPT = 0

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Rules:
  """Rules that drop records, applied in this order; later rules see only the remaining records.

  Attributes:
    where: condition that records must meet, see `tools.data.conditions`; "" for none.
    exact_duplicates: whether to drop records whose encoded image equals that of an earlier one.
    perceptual_distance: maximum number of different bits of the perceptual hashes of
      near-duplicates; None to keep them.
    embedding_similarity: minimum dot product of the image embeddings of near-duplicates; None to
      keep them.
    queries: queries whose matches balance the records, see `tools.data.balance`; () for none.
      Records without a match are dropped.
    clusters: number of clusters of image embeddings that balance the records; 0 for none.
    limit: number of records that a query or cluster keeps on average.
    seed: seed of the balance.

  Raises:
    ValueError: if queries and clusters are both given, or without a valid limit.
  """

  where: str = ""
  exact_duplicates: bool = False
  perceptual_distance: int | None = None
  embedding_similarity: float | None = None
  queries: tuple[str, ...] = ()
  clusters: int = 0
  limit: int | None = None
  seed: int = 0

  def __post_init__(self) -> None:
    if self.clusters < 0:
      raise ValueError(f"balance_clusters={self.clusters}: expected at least 1")
    if self.queries and self.clusters:
      raise ValueError("both --balance_queries and --balance_clusters: give one of them")
    if self.is_balanced != (self.limit is not None):
      raise ValueError(
        "give --balance_queries or --balance_clusters together with --balance_limit, or none"
      )
    if self.limit is not None and self.limit < 1:
      raise ValueError(f"balance_limit={self.limit}: expected at least 1")

  @property
  def is_balanced(self) -> bool:
    """Whether queries or clusters balance the records."""
    return bool(self.queries or self.clusters)


@dataclasses.dataclass(frozen=True)
class Selected:
  """Result of `select`.

  Attributes:
    keep: the keep-list.
    dropped: number of records that each rule dropped, in order, also without any.
    balance: statistics of the balance; None without one.
  """

  keep: KeepList
  dropped: Mapping[str, int]
  balance: Report | None = None


class _Selection:
  """Records that are not dropped yet, and the reason of each dropped one."""

  def __init__(self, annotations: Annotations, progress: Progress):
    self._annotations, self._progress = annotations, progress
    self._bounds = np.cumsum([0, *annotations.info.rows])
    self._reason = np.zeros(len(annotations), np.uint16)  # numbers in `reasons`; 0 is kept
    self.reasons: list[str] = [""]

  @property
  def kept(self) -> NDArray[np.bool_]:
    """Whether each record is kept, bool [n]."""
    return self._reason == _KEPT

  @property
  def dropped(self) -> dict[str, int]:
    """Number of dropped records by reason, in the order of the rules, also without any."""
    counts = np.bincount(self._reason, minlength=len(self.reasons)).tolist()
    return dict(zip(self.reasons[1:], counts[1:], strict=True))

  def drop(self, records: NDArray[np.bool_], reason: str, first: int = 0) -> None:
    """Drop some of the records from `first` on, unless they are dropped already."""
    if reason not in self.reasons:
      self.reasons.append(reason)
    view = self._reason[first : first + len(records)]
    view[records & (view == _KEPT)] = self.reasons.index(reason)

  def each_shard(self, *names: str) -> Any:
    """Yield the first record, the kept records bool [n] and columns of each shard."""
    for shard, (first, stop) in enumerate(zip(self._bounds, self._bounds[1:])):
      kept = self._reason[first:stop] == _KEPT
      if kept.any():
        yield int(first), kept, self._annotations.read(shard, names)
      self._progress(int(stop - first))


def select(annotations: Annotations, rules: Rules, progress: Progress = lambda _: None) -> Selected:
  """Return the keep-list of the records that pass all rules.

  Args:
    annotations: annotations of the source.
    rules: the rules.
    progress: called with numbers of records; each of `passes(rules)` visits all of them.

  Raises:
    ValueError: if a rule is invalid, a column is missing, a file is damaged, or no record is left.
  """
  numbers = number_columns(annotations.info.columns) | {"similarity"}  # missing without a model
  parsed = conditions.parse(rules.where, numbers) if rules.where else []
  near = _near_rules(annotations, rules)
  needed = {name for condition in parsed for name in condition.columns} | {*near}
  needed |= {_texts_of(annotations)} if rules.queries else set()
  needed |= {Clusters.column} if rules.clusters else set()
  for name in sorted(needed - {*annotations.info.columns}):
    annotations.read(0, [name])  # raises with the existing columns
  selection = _Selection(annotations, progress)
  names = sorted({name for condition in parsed for name in condition.columns})
  for first, _, columns in selection.each_shard("error", *names):
    error = np.array([reason is not None for reason in columns["error"]], bool)
    selection.drop(error, "unusable record", first)
    for condition in parsed:
      truth = condition(columns)
      selection.drop(_all(truth.false, error), f"{condition.text} is false", first)
      selection.drop(_all(~truth.true, error), f"{condition.text} is unknown", first)
  if rules.exact_duplicates:
    selection.drop(_repeated(selection), "same content as an earlier record")
  for name, (reason, duplicates) in near.items():
    for first, kept, columns in selection.each_shard(name):
      vectors = columns[name]
      if isinstance(vectors, np.ma.MaskedArray):
        vectors = vectors.data
      is_near = np.zeros(len(kept), bool)
      is_near[kept] = duplicates.add(vectors[kept])
      selection.drop(is_near, reason, first)
  statistics = _balance(selection, annotations, rules) if rules.is_balanced else None
  counts = selection.dropped
  keep = KeepList(
    annotations.info.source, selection.kept, {name: n for name, n in counts.items() if n}
  )
  return Selected(keep, counts, statistics)


def passes(rules: Rules) -> int:
  """Return how often `select` visits all records."""
  near = (rules.perceptual_distance, rules.embedding_similarity)
  balance = 2 * rules.is_balanced + bool(rules.clusters)
  return 1 + rules.exact_duplicates + sum(limit is not None for limit in near) + balance


def table(counts: Mapping[str, int], records: int) -> str:
  """Return a table of the records that each rule dropped, and of those that are left after it."""
  width = max(map(len, (*counts, "rule")))
  lines = [f"{'rule':{width}}  {'dropped':>13}  {'left':>13}"]
  for reason, count in counts.items():
    records -= count
    lines.append(f"{reason:{width}}  {count:13,}  {records:13,}")
  return "\n".join(lines)


def _near_rules(annotations: Annotations, rules: Rules) -> dict[str, tuple[str, NearDuplicates]]:
  """Return the column, reason and search of each rule for near-duplicates."""
  found: dict[str, tuple[str, NearDuplicates]] = {}
  total = len(annotations)
  if (distance := rules.perceptual_distance) is not None:
    reason = f"perceptual hash within {distance} bits of an earlier record"
    found["perceptual_hash"] = (reason, NearHashes(total, distance))
  if (similarity := rules.embedding_similarity) is not None:
    reason = f"embedding similarity of at least {similarity} to an earlier record"
    dim = max(1, annotations.info.dim)
    found["image_embedding"] = (reason, NearEmbeddings(total, similarity, dim))
  return found


def _balance(selection: _Selection, annotations: Annotations, rules: Rules) -> Report:
  """Drop records so that each group keeps about `rules.limit`, and return the statistics."""
  assert rules.limit is not None
  groups: Groups
  if rules.queries:
    groups = Queries(rules.queries, _texts_of(annotations))
  else:
    groups = Clusters(_centers(selection, rules))
  before = np.zeros(groups.size, np.int64)
  for _, kept, columns in selection.each_shard(groups.column):
    before += np.bincount(groups.members(columns, kept)[1], minlength=groups.size)
  after = np.zeros(groups.size, np.int64)
  for first, kept, columns in selection.each_shard(groups.column):
    rows, group = groups.members(columns, kept)
    is_member, is_kept = np.zeros((2, len(kept)), bool)
    is_member[rows] = True
    is_kept[rows[drawn(rules.seed, first + rows, group, before, rules.limit)]] = True
    after += np.bincount(group[is_kept[rows]], minlength=groups.size)
    if rules.queries:
      selection.drop(~is_member, "no query matches", first)
    selection.drop(~is_kept, f"balance of {rules.limit:,} per {groups.unit}", first)
  return report(groups, rules.limit, before, after)


def _centers(selection: _Selection, rules: Rules) -> NDArray[np.float32]:
  """Return the centers of the clusters, from a sample of the kept records."""
  fraction = sample_fraction(rules.clusters, int(selection.kept.sum()))
  sample = [np.zeros((0, 1), np.float16)]
  for first, kept, columns in selection.each_shard(Clusters.column):
    chosen = kept & is_sampled(rules.seed, np.arange(first, first + len(kept)), fraction)
    sample.append(columns[Clusters.column][chosen])
  return centers_of(np.concatenate(sample[1:] or sample), rules.clusters, rules.seed)


def _texts_of(annotations: Annotations) -> str:
  """Return the column of texts: new captions if there are any, or the texts of the source."""
  return "captions" if "captions" in annotations.info.columns else "texts"


def _repeated(selection: _Selection) -> NDArray[np.bool_]:
  """Return the records whose content hash equals that of an earlier kept record, bool [n]."""
  records, hashes = [], []
  for first, kept, columns in selection.each_shard("content_hash"):
    numbers = np.flatnonzero(kept)
    records.append(first + numbers)
    hashes.append(b"".join(columns["content_hash"][number] for number in numbers))
  is_repeated = np.zeros(len(selection.kept), bool)
  if hashes:
    halves = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: earlier records come first
    is_same = (halves[order][1:] == halves[order][:-1]).all(axis=1)
    is_repeated[np.concatenate(records)[order[1:][is_same]]] = True
  return is_repeated


def _all(mask: NDArray[np.bool_], like: NDArray[np.bool_]) -> NDArray[np.bool_]:
  """Return a mask with the length of another; conditions without columns have one value."""
  return np.broadcast_to(mask, like.shape)
