"""Retrieval between pictures and texts: recall at k and median rank, both ways.

Equal scores never help a model. A figure is the expected value over a random order of what is
equal, so a model that embeds everything alike gets exactly chance, wherever the right answer
stands in the data. Equal means within 1e-6 of the largest possible score: float32 sums of one
product differ by less, depending on where they stand in a matrix.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import dataclasses
import functools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ov_eval.embeddings import Progress, check_finite
from ov_eval.likelihood import Batch, one_late
from ov_eval.processes import gather as gather_processes
from ov_eval.results import Result
from ov_eval.states import Share

_EQUAL = 1e-6
_STRIP = 64
# Counts of a block are kept as above * _PAIR + at least; both stay below it, the whole in int32.
_PAIR = 2**15


@dataclasses.dataclass(frozen=True, eq=False)
class QueryRanks:
  """Where the best right answer stands for each query; arrays [Q].

  Attributes:
    queries: int64, the rows (of images or texts) that have a right answer.
    before: int64, wrong candidates with a higher score than the best right one.
    equal: int64, wrong candidates with the same score as the best right one.
    right: int64, right candidates with that score, at least 1.
  """

  queries: np.ndarray
  before: np.ndarray
  equal: np.ndarray
  right: np.ndarray

  @property
  def expected_rank(self) -> np.ndarray:
    """Of the first right candidate, 1 is best: float64 [Q], the mean over orders of equals."""
    return self.before + (self.equal + self.right + 1) / (self.right + 1)

  def hits(self, k: int) -> np.ndarray:
    """Probability float64 [Q] that one of the first k candidates is right."""
    miss = np.ones(len(self.before))
    for place in range(k):  # of the equals that still fit into the first k, each wrong
      wrong = np.maximum(self.equal - place, 0)
      factor = wrong / np.maximum(self.equal + self.right - place, 1)
      miss *= np.where(self.before + place < k, factor, 1.0)
    return 1 - miss

  def recall(self, k: int) -> Share:
    """Share of the queries with a right answer among the first k."""
    return Share.of(self.hits(k))

  def median(self, name: str, level: float = 0.95) -> Result:
    """Median of `expected_rank`, with the distribution-free interval of order statistics."""
    ranks = np.sort(self.expected_rank)
    n = len(ranks)
    spread = statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(n)
    low = ranks[max(math.floor((n - spread) / 2), 0)]
    high = ranks[min(math.ceil((n + spread) / 2), n - 1)]
    return Result(name, float(np.median(ranks)), n, float(low), float(high), "rank")

  def worst(self, limit: int = 10) -> np.ndarray:
    """The queries with the worst rank, worst first; equal ones in order of row."""
    order = np.argsort(-self.expected_rank, kind="stable")
    return self.queries[order[:limit]]


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalResult:
  """Ranks both ways."""

  img2txt: QueryRanks
  txt2img: QueryRanks
  ks: tuple[int, ...] = (1, 5, 10)

  def results(self, level: float = 0.95) -> list[Result]:
    """`img2txt_r<k>` for each k, `img2txt_median_rank`, and the same for `txt2img`.

    `count` is the number of queries; the median's interval is in ranks.
    """
    results = []
    for name, ranks in (("img2txt", self.img2txt), ("txt2img", self.txt2img)):
      results += [ranks.recall(k).result(f"{name}_r{k}", level) for k in self.ks]
      results.append(ranks.median(f"{name}_median_rank", level))
    return results


def retrieval(
  images: np.ndarray,
  texts: np.ndarray,
  text_image: np.ndarray,
  *,
  ks: Sequence[int] = (1, 5, 10),
  chunk: int = 1024,
  gather: Callable[[Any], list[Any]] = gather_processes,
  progress: Progress | None = None,
) -> RetrievalResult:
  """Ranks all texts for every picture and all pictures for every text, by the dot product.

  Picture to text counts the best of a picture's texts. A picture without text is a candidate, but
  no query. Never more than 64 x 8 chunk scores exist, of which counts per picture and text remain.
  The texts lie on the device, so that on a CPU they take their memory twice. Pictures are shared
  among the processes.

  Args:
    images: float32 [I, E], the same in every process.
    texts: float32 [X, E].
    text_image: int [X], the row of `images` that each text belongs to.
    ks: for recall at k.
    chunk: pictures scored at a time, 1 to 4095.
    gather: value -> values of all processes; called once.
    progress: is told (scores done, scores of this process).

  Raises:
    ValueError: for arrays that do not fit together, rows that do not exist, or embeddings that are
      not finite.
  """
  images, texts = _matrix(images, "images"), _matrix(texts, "texts")
  if images.shape[1] != texts.shape[1]:
    raise ValueError(f"images {images.shape} and texts {texts.shape} must have one width E.")
  owner = np.asarray(text_image, np.int64)
  if owner.shape != texts.shape[:1]:
    raise ValueError(f"text_image {owner.shape} must name the image of each of {len(texts)} texts.")
  if owner.min() < 0 or owner.max() >= len(images):
    bad = owner[(owner < 0) | (owner >= len(images))][0]
    raise ValueError(f"text_image holds {bad}, which is not a row of {len(images)} images.")
  if min(ks) < 1:
    raise ValueError(f"ks={tuple(ks)} must be 1 or more.")
  if not 1 <= chunk < _PAIR // 8:
    raise ValueError(f"chunk={chunk} must lie between 1 and {_PAIR // 8 - 1}.")

  own = _pair_scores(images, texts, owner)
  best = np.full(len(images), np.inf)  # a picture without text is no query: nothing is above inf
  best[owner] = -np.inf
  np.maximum.at(best, owner, own)
  margin = _margin(images, texts)
  right = np.bincount(owner[own >= best[owner] - margin], minlength=len(images))

  before_i, at_least_i, before_t, at_least_t = _counts(
    images, texts, owner, best, own, margin, chunk, gather, progress
  )
  rows = np.flatnonzero(np.isfinite(best))
  return RetrievalResult(
    QueryRanks(rows, before_i[rows], (at_least_i - before_i)[rows], right[rows]),
    QueryRanks(np.arange(len(texts)), before_t, at_least_t - before_t, np.ones_like(before_t)),
    tuple(ks),
  )


def _counts(
  images: np.ndarray,
  texts: np.ndarray,
  owner: np.ndarray,
  best: np.ndarray,
  own: np.ndarray,
  margin: float,
  chunk: int,
  gather: Callable[[Any], list[Any]],
  progress: Progress | None,
) -> list[np.ndarray]:
  """Wrong candidates above, and not below, the best right one: int64 [I], [I], [X], [X]."""
  processes, process = jax.process_count(), jax.process_index()
  starts = range(process * chunk, len(images), processes * chunk)
  in_all = sum(min(chunk, len(images) - start) for start in starts) * len(texts)
  put = functools.partial(jax.device_put, device=jax.local_devices()[0])
  tiles = [slice(at, min(at + 8 * chunk, len(texts))) for at in range(0, len(texts), 8 * chunk)]
  of_tile = [
    put((texts[tile], owner[tile].astype(np.int32), *_bounds(own[tile], margin))) for tile in tiles
  ]

  def blocks() -> Iterator[Batch]:
    for start in starts:
      rows = slice(start, min(start + chunk, len(images)))
      numbers = np.arange(rows.start, rows.stop, dtype=np.int32)
      of_rows = put((images[rows], numbers, *_bounds(best[rows], margin)))
      for tile, on_device in zip(tiles, of_tile, strict=True):
        yield {"rows": rows, "tile": tile, "args": (of_rows, on_device)}

  of_images = np.zeros((2, len(images)), np.int64)
  of_texts = np.zeros((2, len(texts)), np.int64)
  done = 0
  for block, (per_image, per_text) in one_late(lambda b: _count_block(*b["args"]), blocks()):
    of_images[:, block["rows"]] += per_image
    of_texts[:, block["tile"]] += per_text
    done += len(per_image[0]) * len(per_text[0])
    if progress:
      progress(done, in_all)
  totals = sum(gather(np.concatenate([of_images, of_texts], 1)))
  return [*totals[:, : len(images)], *totals[:, len(images) :]]


@jax.jit
def _count_block(
  images: tuple[jax.Array, ...], texts: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  """Counts int32 [2, c] per image and [2, x] per text of a block; own pairs are left out.

  Scores exist for a strip of images at a time: strips that stay in a processor's cache are several
  times as fast as whole blocks, whose every score each of the counts reads from memory.

  Args:
    images: vectors [c, E], row numbers [c], and per row the score above which a candidate is
      before, and the one from which on it is at least equal [c].
    texts: vectors [x, E], the row of each one's image [x], and the same two bounds [x].
  """
  text_vectors, owner, above_text, from_text = texts

  def strip(per_text: jax.Array, rows: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    vectors, numbers, above_image, from_image = rows
    # The default precision of an accelerator would round the inputs to 8 or 11 bits.
    scores = jnp.matmul(vectors, text_vectors.T, precision=jax.lax.Precision.HIGHEST)
    wrong = (owner != numbers[:, None]) & (numbers >= 0)[:, None]
    scores = jnp.where(wrong, scores, -jnp.inf)
    # Both counts in one number halve the sums.
    count = lambda above, at_least, axis: jnp.sum(
      jnp.where(scores > above, _PAIR, 0) + (scores >= at_least), axis, dtype=jnp.int32
    )
    per_image = count(above_image[:, None], from_image[:, None], 1)
    return per_text + count(above_text, from_text, 0), per_image

  size = len(images[0])
  strips = [  # filled up with rows that have the number -1
    jnp.pad(x, ((0, -size % _STRIP), *[(0, 0)] * (x.ndim - 1)), constant_values=-1).reshape(
      -1, _STRIP, *x.shape[1:]
    )
    for x in images
  ]
  per_text, per_image = jax.lax.scan(strip, jnp.zeros(len(owner), jnp.int32), strips)
  both = lambda pairs: jnp.stack([pairs // _PAIR, pairs % _PAIR])
  return both(per_image.ravel()[:size]), both(per_text)


def _bounds(scores: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
  return (scores + margin).astype(np.float32), (scores - margin).astype(np.float32)


def _pair_scores(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> np.ndarray:
  """float64 [X]: the score of each text with its own image."""
  scores = np.empty(len(texts))
  for start in range(0, len(texts), 4096):
    some = slice(start, start + 4096)
    scores[some] = np.einsum("xe,xe->x", images[owner[some]], texts[some], dtype=np.float64)
  return scores


def _margin(queries: np.ndarray, candidates: np.ndarray) -> float:
  """Scores that differ by less count as equal."""
  longest = [float(np.linalg.norm(rows, axis=1).max()) for rows in (queries, candidates)]
  return _EQUAL * longest[0] * longest[1]


def _matrix(rows: np.ndarray, what: str) -> np.ndarray:
  rows = np.asarray(rows, np.float32)
  if rows.ndim != 2 or not len(rows):
    raise ValueError(f"{what} {rows.shape} must have the shape [rows, E] with at least one row.")
  return check_finite(rows, what)


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """What one query found, best first.

  Attributes:
    found: rows of the candidates.
    scores: theirs.
    right: whether each is a right answer.
    rank: of the best right answer, 1 is best, equals as in `retrieval` and rounded up; None for a
      query without a right answer.
  """

  found: tuple[int, ...]
  scores: tuple[float, ...]
  right: tuple[bool, ...]
  rank: int | None


def top_retrieved(
  queries: np.ndarray,
  candidates: np.ndarray,
  right: Sequence[Collection[int]],
  *,
  k: int = 5,
) -> list[Retrieved]:
  """The k best candidates of some queries, to be shown; equal scores in order of row.

  Args:
    queries: float32 [Q, E].
    candidates: float32 [C, E].
    right: for each query the rows of the right candidates.
    k: how many to return.
  """
  queries, candidates = _matrix(queries, "queries"), _matrix(candidates, "candidates")
  if len(right) != len(queries):
    raise ValueError(f"right names the answers of {len(right)} queries; expected {len(queries)}.")
  margin, results = _margin(queries, candidates), []
  for query, answers in zip(queries, right, strict=True):
    scores = candidates @ query
    # A stable order of the few that can be among the first k, not of all candidates.
    floor = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
    rows = np.flatnonzero(scores >= floor)
    found = rows[np.argsort(-scores[rows], kind="stable")][:k]
    results.append(
      Retrieved(
        tuple(found.tolist()),
        tuple(scores[found].tolist()),
        tuple(row in answers for row in found.tolist()),
        _rank(scores, np.asarray(sorted(answers), int), margin),
      )
    )
  return results


def _rank(scores: np.ndarray, answers: np.ndarray, margin: float) -> int | None:
  if not answers.size:
    return None
  best = scores[answers].max()
  wrong = np.delete(scores, answers)
  before, at_least = (wrong > best + margin).sum(), (wrong >= best - margin).sum()
  tied = (scores[answers] >= best - margin).sum()
  ranks = QueryRanks(*(np.array([n]) for n in (0, before, at_least - before, tied)))
  return math.ceil(ranks.expected_rank[0])
