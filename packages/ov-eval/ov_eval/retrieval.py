"""Image-text retrieval: recall@k and median rank in both directions.

Metrics are expected values over a random order of tied candidates, so a constant embedding gets
exactly chance level, whatever the order of the data. Scores within 1e-6 of the largest possible
score count as tied: float32 dot products of the same vectors differ by less, depending on their
position in a matrix.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ov_eval.embeddings import Progress, check_finite
from ov_eval.likelihood import Batch, dispatch_ahead
from ov_eval.processes import gather as gather_processes
from ov_eval.results import Result
from ov_eval.states import Share

_EQUAL = 1e-6
_STRIP = 64
# Two counts of a block are packed as above * _PAIR + at_least; both are below _PAIR, so the packed
# value fits int32.
_PAIR = 2**15


@dataclasses.dataclass(frozen=True, eq=False)
class QueryRanks:
  """Rank of the best correct candidate of each query; arrays [Q].

  Attributes:
    queries: int64, rows (of images or texts) that have a correct candidate.
    before: int64, number of wrong candidates with a higher score than the best correct one.
    equal: int64, number of wrong candidates tied with the best correct one.
    right: int64, number of correct candidates with that score, at least 1.
  """

  queries: np.ndarray
  before: np.ndarray
  equal: np.ndarray
  right: np.ndarray

  @property
  def expected_rank(self) -> np.ndarray:
    """Expected rank of the first correct candidate over orders of ties, from 1: float64 [Q]."""
    return self.before + (self.equal + self.right + 1) / (self.right + 1)

  def hits(self, k: int) -> np.ndarray:
    """Return the probability that one of the first k candidates is correct, float64 [Q]."""
    miss = np.ones(len(self.before))
    for i in range(k):  # the i-th tied candidate is wrong, if it is among the first k
      wrong = np.maximum(self.equal - i, 0)
      factor = wrong / np.maximum(self.equal + self.right - i, 1)
      miss *= np.where(self.before + i < k, factor, 1.0)
    return 1 - miss

  def recall(self, k: int) -> Share:
    """Return the fraction of queries with a correct candidate among the first k."""
    return Share.of(self.hits(k))

  def median(self, name: str, level: float = 0.95) -> Result:
    """Return the median of `expected_rank`, with the interval given by order statistics."""
    ranks = np.sort(self.expected_rank)
    n = len(ranks)
    spread = statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(n)
    low = ranks[max(math.floor((n - spread) / 2), 0)]
    high = ranks[min(math.ceil((n + spread) / 2), n - 1)]
    return Result(name, float(np.median(ranks)), n, float(low), float(high), "rank")

  def worst(self, limit: int = 10) -> np.ndarray:
    """Return the queries with the worst ranks, worst first; ties in order of row."""
    order = np.argsort(-self.expected_rank, kind="stable")
    return self.queries[order[:limit]]


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalResult:
  """Ranks in both directions."""

  img2txt: QueryRanks
  txt2img: QueryRanks
  ks: tuple[int, ...] = (1, 5, 10)

  def results(self, level: float = 0.95) -> list[Result]:
    """Return `img2txt_r<k>` for each k, `img2txt_median_rank`, and the same for `txt2img`.

    `count` is the number of queries; the interval of the median is in ranks.
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
  """Rank all texts for every image and all images for every text, by the dot product.

  Image-to-text uses the best text of an image, and text-to-image the best image of a text. An image
  without text is a candidate, but not a query. At most 64 x 8 chunk scores are materialised; only
  counts per image and text are kept. The texts are copied to the device, which doubles their memory
  on a CPU. Images are sharded over the processes.

  Args:
    images: image embeddings float32 [I, E], the same on every process.
    texts: text embeddings float32 [X, E].
    text_image: int [X], row of `images` that each text belongs to. If texts belong to several
      images: int [P, 2], pairs of a row of `texts` and a row of `images` that are correct for each
      other; every text needs a pair.
    ks: values of k for recall@k.
    chunk: number of images scored at a time, 1 to 4095.
    gather: maps a value to the values of all processes; called once.
    progress: called with (scores done, total scores of this process).

  Raises:
    ValueError: if shapes do not match, `text_image` is out of range, a text has no image, or an
      embedding contains NaN or Inf.
  """
  images, texts = _matrix(images, "images"), _matrix(texts, "texts")
  if images.shape[1] != texts.shape[1]:
    raise ValueError(f"images {images.shape} and texts {texts.shape} must have the same width E.")
  pairs = _pairs(text_image, len(texts), len(images))
  if min(ks) < 1:
    raise ValueError(f"ks={tuple(ks)} must be >= 1.")
  if not 1 <= chunk < _PAIR // 8:
    raise ValueError(f"chunk={chunk} must be between 1 and {_PAIR // 8 - 1}.")

  of_text, of_image = pairs.T
  own = _pair_scores(images, texts, pairs)
  margin = _margin(images, texts)
  best_i, right_i = _best(own, of_image, len(images), margin)
  best_t, right_t = _best(own, of_text, len(texts), margin)
  before_i, at_least_i, before_t, at_least_t = _counts(
    images, texts, pairs, best_i, best_t, margin, chunk, gather, progress
  )
  rows = np.flatnonzero(np.isfinite(best_i))
  return RetrievalResult(
    QueryRanks(rows, before_i[rows], (at_least_i - before_i)[rows], right_i[rows]),
    QueryRanks(np.arange(len(texts)), before_t, at_least_t - before_t, right_t),
    tuple(ks),
  )


def _pairs(text_image: np.ndarray, texts: int, images: int) -> np.ndarray:
  """Return the distinct pairs of a text and an image, int64 [P, 2], in order of text."""
  pairs = np.asarray(text_image, np.int64)
  if pairs.ndim == 1 and len(pairs) == texts:
    pairs = np.stack([np.arange(texts), pairs], 1)
  if pairs.ndim != 2 or pairs.shape[1] != 2:
    raise ValueError(
      f"text_image {pairs.shape} must have one row of `images` for each of {texts} texts, or pairs "
      "[P, 2] of texts and images."
    )
  for column, count, what in ((0, texts, "texts"), (1, images, "images")):
    rows = pairs[:, column]
    if len(bad := rows[(rows < 0) | (rows >= count)]):
      raise ValueError(f"text_image contains {bad[0]}, which is not a row of {count} {what}.")
  pairs = np.unique(pairs, axis=0)
  if len(alone := np.setdiff1d(np.arange(texts), pairs[:, 0])):
    raise ValueError(f"text_image: text {alone[0]} has no image; leave it out of `texts`.")
  return pairs


def _best(
  scores: np.ndarray, rows: np.ndarray, count: int, margin: float
) -> tuple[np.ndarray, np.ndarray]:
  """Return the best score of the pairs of each row, and how many pairs have it.

  Args:
    scores: float64 [P].
    rows: int64 [P], row of each pair.
    count: number of rows.
    margin: difference below which scores count as tied.

  Returns:
    float64 [count], Inf for a row without a pair, and int64 [count].
  """
  best = np.full(count, np.inf)
  best[rows] = -np.inf
  np.maximum.at(best, rows, scores)
  return best, np.bincount(rows[scores >= best[rows] - margin], minlength=count)


def _links(pairs: np.ndarray, images: int, texts: int) -> tuple[np.ndarray, np.ndarray]:
  """Return numbers of images and texts of which one is shared exactly by the correct pairs.

  One side has its row number and the other all rows it belongs to, padded with -1. The shorter of
  the two forms is used.

  Returns:
    int32 [I, G] and int32 [X, H], where G or H is 1.
  """
  of_text, of_image = pairs.T
  per_image, per_text = np.bincount(of_image), np.bincount(of_text)
  if per_text.max() <= per_image.max():
    return np.arange(images, dtype=np.int32)[:, None], _table(of_text, of_image, texts)
  return _table(of_image, of_text, images), np.arange(texts, dtype=np.int32)[:, None]


def _table(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
  """Return the values of each row, padded with -1: int32 [count, most values of a row]."""
  order = np.argsort(rows, kind="stable")
  sizes = np.bincount(rows, minlength=count)
  column = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  table = np.full((count, sizes.max()), -1, np.int32)
  table[rows[order], column] = values[order]
  return table


def _counts(
  images: np.ndarray,
  texts: np.ndarray,
  pairs: np.ndarray,
  best_image: np.ndarray,
  best_text: np.ndarray,
  margin: float,
  chunk: int,
  gather: Callable[[Any], list[Any]],
  progress: Progress | None,
) -> list[np.ndarray]:
  """Return counts of wrong candidates above, and at or above, the best correct one.

  Returns:
    int64 [I], [I] per image and [X], [X] per text.
  """
  processes, process = jax.process_count(), jax.process_index()
  starts = range(process * chunk, len(images), processes * chunk)
  total = sum(min(chunk, len(images) - start) for start in starts) * len(texts)
  put = functools.partial(jax.device_put, device=jax.local_devices()[0])
  tiles = [slice(at, min(at + 8 * chunk, len(texts))) for at in range(0, len(texts), 8 * chunk)]
  links_image, links_text = _links(pairs, len(images), len(texts))
  of_tile = [
    put((texts[tile], links_text[tile], *_bounds(best_text[tile], margin))) for tile in tiles
  ]

  def blocks() -> Iterator[Batch]:
    for start in starts:
      rows = slice(start, min(start + chunk, len(images)))
      of_rows = put((images[rows], links_image[rows], *_bounds(best_image[rows], margin)))
      for tile, on_device in zip(tiles, of_tile, strict=True):
        yield {"rows": rows, "tile": tile, "args": (of_rows, on_device)}

  of_images = np.zeros((2, len(images)), np.int64)
  of_texts = np.zeros((2, len(texts)), np.int64)
  done = 0
  for block, (per_image, per_text) in dispatch_ahead(lambda b: _count_block(*b["args"]), blocks()):
    of_images[:, block["rows"]] += per_image
    of_texts[:, block["tile"]] += per_text
    done += len(per_image[0]) * len(per_text[0])
    if progress:
      progress(done, total)
  totals = sum(gather(np.concatenate([of_images, of_texts], 1)))
  return [*totals[:, : len(images)], *totals[:, len(images) :]]


@jax.jit
def _count_block(
  images: tuple[jax.Array, ...], texts: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  """Return counts int32 [2, c] per image and [2, x] per text of a block, without correct pairs.

  Scores are computed for one strip of images at a time. Strips fit the processor cache, which is
  several times as fast as a block of scores that each count reads from memory.

  Args:
    images: vectors [c, E], links [c, G] (see `_links`), and per row the bounds [c] above which a
      candidate counts as before, and from which on as at least equal.
    texts: vectors [x, E], links [x, H], and the same two bounds [x].
  """
  text_vectors, text_links, above_text, from_text = texts

  def strip(per_text: jax.Array, rows: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    vectors, links, above_image, from_image, real = rows
    # Accelerators would round the inputs to 8 or 11 bits by default.
    scores = jnp.matmul(vectors, text_vectors.T, precision=jax.lax.Precision.HIGHEST)
    # Accelerators would round the inputs to 8 or 11 bits by default.
    scores = jnp.matmul(vectors, text_vectors.T, precision=jax.lax.Precision.HIGHEST)
    wrong = real[:, None]
    for link, other in itertools.product(links.T, text_links.T):
      wrong &= link[:, None] != other
    scores = jnp.where(wrong, scores, -jnp.inf)
    # Packing both counts into one number halves the number of sums.
    count = lambda above, at_least, axis: jnp.sum(
      jnp.where(scores > above, _PAIR, 0) + (scores >= at_least), axis, dtype=jnp.int32
    )
    per_image = count(above_image[:, None], from_image[:, None], 1)
    return per_text + count(above_text, from_text, 0), per_image

  size = len(images[0])
  strips = [
    jnp.pad(x, ((0, -size % _STRIP), *[(0, 0)] * (x.ndim - 1))).reshape(-1, _STRIP, *x.shape[1:])
    for x in (*images, jnp.ones(size, bool))
  ]
  per_text, per_image = jax.lax.scan(strip, jnp.zeros(len(text_vectors), jnp.int32), strips)
  both = lambda pairs: jnp.stack([pairs // _PAIR, pairs % _PAIR])
  return both(per_image.ravel()[:size]), both(per_text)


def _bounds(scores: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
  return (scores + margin).astype(np.float32), (scores - margin).astype(np.float32)


def _pair_scores(images: np.ndarray, texts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Return the score of each pair of a text and an image, float64 [P]."""
  scores = np.empty(len(pairs))
  for start in range(0, len(pairs), 4096):
    some = slice(start, start + 4096)
    text, image = pairs[some].T
    scores[some] = np.einsum("xe,xe->x", images[image], texts[text], dtype=np.float64)
  return scores


def _margin(queries: np.ndarray, candidates: np.ndarray) -> float:
  """Return the difference below which scores count as tied."""
  longest = [float(np.linalg.norm(rows, axis=1).max()) for rows in (queries, candidates)]
  return _EQUAL * longest[0] * longest[1]


def _matrix(rows: np.ndarray, what: str) -> np.ndarray:
  rows = np.asarray(rows, np.float32)
  if rows.ndim != 2 or not len(rows):
    raise ValueError(f"{what} {rows.shape} must have the shape [rows, E] with at least one row.")
  return check_finite(rows, what)


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """Candidates retrieved for one query, best first.

  Attributes:
    found: rows of the candidates.
    scores: scores of the candidates.
    right: whether each candidate is correct.
    rank: expected rank of the best correct candidate from 1, rounded up; None for a query without a
      correct candidate.
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
  """Return the k best candidates of each query for display; ties in order of row.

  Args:
    queries: query embeddings float32 [Q, E].
    candidates: candidate embeddings float32 [C, E].
    right: rows of the correct candidates of each query.
    k: number of candidates to return.
  """
  queries, candidates = _matrix(queries, "queries"), _matrix(candidates, "candidates")
  if len(right) != len(queries):
    raise ValueError(f"right has entries for {len(right)} queries; expected {len(queries)}.")
  margin, results = _margin(queries, candidates), []
  for query, answers in zip(queries, right, strict=True):
    scores = candidates @ query
    # Sort only the candidates that can be among the first k.
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
