"""Select records by their annotations: conditions, exact duplicates and near-duplicates."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ov_data.annotations import Annotations
from ov_data.keep_list import KeepList
from tools.data import conditions
from tools.data.near_duplicates import NearDuplicates, NearEmbeddings, NearHashes

NUMBERS = frozenset(("record", "width", "height", "similarity"))  # columns of conditions
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
  """

  where: str = ""
  exact_duplicates: bool = False
  perceptual_distance: int | None = None
  embedding_similarity: float | None = None


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


def select(
  annotations: Annotations, rules: Rules, progress: Progress = lambda _: None
) -> tuple[KeepList, dict[str, int]]:
  """Return the keep-list of the records that pass all rules.

  Args:
    annotations: annotations of the source.
    rules: the rules.
    progress: called with numbers of records; each of `passes(rules)` visits all of them.

  Returns:
    The keep-list, and the number of records that each rule dropped, in order.

  Raises:
    ValueError: if a rule is invalid, a column is missing, a file is damaged, or no record is left.
  """
  parsed = conditions.parse(rules.where, NUMBERS) if rules.where else []
  near = _near_rules(annotations, rules)
  needed = {name for condition in parsed for name in condition.columns} | {*near}
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
  counts = selection.dropped
  keep = KeepList(
    annotations.info.source, selection.kept, {name: n for name, n in counts.items() if n}
  )
  return keep, counts


def passes(rules: Rules) -> int:
  """Return how often `select` visits all records."""
  near = (rules.perceptual_distance, rules.embedding_similarity)
  return 1 + rules.exact_duplicates + sum(limit is not None for limit in near)


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
