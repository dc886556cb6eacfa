"""Corpus BLEU-4 and CIDEr-D of generated captions, as in the COCO caption evaluation.

Given equal tokens, scores equal those of the COCO caption evaluation (BLEU up to the 1e-9 that it
adds to counts). The default tokenizer is `caption_text.caption_words`.
"""

import collections
from collections.abc import Iterable, Sequence
import dataclasses
import math
import statistics
from typing import Self

import numpy as np

from ov_eval.caption_text import Tokenise, caption_words, compared_words
from ov_eval.captions import CaptionRecord
from ov_eval.ptb import ptb_words
from ov_eval.results import Result
from ov_eval.states import Mean

TOKENS: dict[str, Tokenise] = {"words": caption_words, "ptb": ptb_words}
_ORDER = 4  # longest n-gram
_SIGMA = 6.0  # width of the length penalty of CIDEr-D


@dataclasses.dataclass(frozen=True, eq=False)
class Bleu:
  """Corpus BLEU-4 (Papineni et al. 2002); exactly mergeable with `+`.

  Attributes:
    count: number of candidates.
    sums: int64 [10]: clipped matches of 1- to 4-grams, n-grams of the candidates, words of the
      candidates, words of their closest references.
    products: int64 [10, 10]: sum over candidates of the outer product of these ten numbers, used
      for the confidence interval.
  """

  count: int
  sums: np.ndarray
  products: np.ndarray

  def __add__(self, other: Self) -> Self:
    return type(self)(
      self.count + other.count, self.sums + other.sums, self.products + other.products
    )

  @property
  def brevity_penalty(self) -> float:
    """exp(1 - r / c) if the candidates are shorter than the references, else 1."""
    length, reference = self.sums[8:].tolist()
    if length >= reference:
      return 1.0
    return math.exp(1 - reference / length) if length else 0.0

  @property
  def value(self) -> float:
    """Geometric mean of the four precisions times the brevity penalty, without smoothing.

    0 if no 4-gram matches; NaN without candidates.
    """
    if not self.count:
      return math.nan
    matches, totals = self.sums[:4], self.sums[4:8]
    if not matches.all():
      return 0.0
    return self.brevity_penalty * statistics.geometric_mean((matches / totals).tolist())

  def interval(self, level: float = 0.95) -> tuple[float, float] | None:
    """Return the interval by linearisation over candidates; None if the value is 0 or NaN."""
    value = self.value
    if not value > 0:
      return None
    sums = self.sums.astype(np.float64)
    slope = np.zeros(10)  # derivative of log BLEU with respect to each sum
    slope[:4], slope[4:8] = 0.25 / sums[:4], -0.25 / sums[4:8]
    if sums[8] < sums[9]:
      slope[8], slope[9] = sums[9] / sums[8] ** 2, -1 / sums[8]
    error = value * math.sqrt(max(slope @ self.products @ slope, 0.0))
    half = statistics.NormalDist().inv_cdf((1 + level) / 2) * error
    return max(0.0, value - half), min(1.0, value + half)

  def result(self, name: str = "bleu4", level: float = 0.95) -> Result:
    """Return value in [0, 1], number of candidates and interval as a named result."""
    low, high = self.interval(level) or (None, None)
    return Result(name, self.value, self.count, low, high)


def bleu4(
  candidates: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  tokenise: Tokenise = caption_words,
) -> Bleu:
  """Return corpus BLEU-4: counts are summed over all candidates before computing precisions.

  Matches of an n-gram are clipped to its maximum count in any one reference. The reference length
  is that of the closest reference, the shorter one in a tie. An empty candidate matches nothing
  but contributes its reference length.

  Args:
    candidates: N captions.
    references: reference captions of each candidate, at least one.
    tokenise: maps a text to tokens; see `caption_text.compared_words`.

  Raises:
    ValueError: if the lengths differ or a candidate has no reference.

  Examples:
    >>> import ov_eval
    >>> captions = ["a red circle above a square"]
    >>> ov_eval.bleu4(captions, [captions]).count
    1
  """
  rows = np.zeros((len(candidates), 10), np.int64)
  for row, (words, truths) in zip(rows, _tokens(candidates, references, tokenise), strict=True):
    counts = _ngrams(words)
    most: collections.Counter[tuple[str, ...]] = collections.Counter()
    for truth in truths:
      most |= _ngrams(truth)
    for ngram, times in counts.items():
      row[len(ngram) - 1] += min(times, most[ngram])
      row[len(ngram) + 3] += times
    row[8] = len(words)
    row[9] = min((abs(len(truth) - len(words)), len(truth)) for truth in truths)[1]
  return Bleu(len(rows), rows.sum(0), rows.T @ rows)


def cider_scores(
  candidates: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  tokenise: Tokenise = caption_words,
) -> np.ndarray:
  """Return CIDEr-D of each candidate, float64 [N] from 0 to 10 (Vedantam et al., arXiv 1411.5726).

  For n = 1..4, n-grams are weighted by tf-idf, with the weights of the candidate clipped to those
  of the reference. The score is their cosine times exp(-(difference in words)^2 / (2 sigma^2)),
  sigma = 6, averaged over references and n, times 10. Papers report 100 times this value. The
  document frequency is computed over the references of these N images, so scores depend on the set
  of images; with a single image all scores are 0.

  Args:
    candidates, references, tokenise: see `bleu4`; all N images of all processes.

  Raises:
    ValueError: see `bleu4`.
  """
  pairs = [
    (_ngrams(words), [_ngrams(truth) for truth in truths])
    for words, truths in _tokens(candidates, references, tokenise)
  ]
  document_frequency = collections.Counter(
    ngram for _, truths in pairs for ngram in set().union(*truths)
  )
  rarest = math.log(len(pairs)) if pairs else 0.0

  def weigh(counts: collections.Counter[tuple[str, ...]]) -> "_Vector":
    weights = {
      ngram: times * (rarest - math.log(max(1, document_frequency[ngram])))
      for ngram, times in counts.items()
    }
    squares = [0.0] * _ORDER
    for ngram, weight in weights.items():
      squares[len(ngram) - 1] += weight * weight
    # The COCO code measures length in 2-grams; differences of lengths are those in words.
    length = sum(times for ngram, times in counts.items() if len(ngram) == 2)
    return _Vector(weights, [math.sqrt(square) for square in squares], length)

  scores = np.zeros(len(pairs))
  for i, (counts, truths) in enumerate(pairs):
    vector = weigh(counts)
    scores[i] = statistics.fmean(_similarity(vector, weigh(truth)) for truth in truths)
  return 10 * scores


def cider(
  candidates: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  tokenise: Tokenise = caption_words,
) -> Mean:
  """Return the mean of `cider_scores`; the interval treats idf as fixed."""
  return Mean.of(cider_scores(candidates, references, tokenise=tokenise))


def caption_metrics(
  records: Iterable[CaptionRecord], level: float = 0.95, *, tokens: str = "words"
) -> list[Result]:
  """Return `bleu4` and `cider` of the records of all processes; empty without records.

  Records with equal `index` are the same example and count once.

  Args:
    records: records returned by `generate_captions`.
    level: level of the confidence intervals.
    tokens: key of `TOKENS`: "words" ignores case, punctuation and spacing, in any script; "ptb"
      uses the tokens of the COCO caption evaluation, for English.

  Raises:
    ValueError: if `tokens` is unknown.
  """
  if tokens not in TOKENS:
    raise ValueError(f"tokens={tokens!r}: expected one of {', '.join(TOKENS)}.")
  once = list({record.index: record for record in records}.values())
  if not once:
    return []
  texts, references = [r.generated for r in once], [r.references for r in once]
  return [
    bleu4(texts, references, tokenise=TOKENS[tokens]).result("bleu4", level),
    cider(texts, references, tokenise=TOKENS[tokens]).result("cider", level),
  ]


@dataclasses.dataclass(frozen=True)
class _Vector:
  """tf-idf weights of the n-grams of a caption, their norm for each n, and its length."""

  weights: dict[tuple[str, ...], float]
  norms: list[float]
  length: int


def _similarity(candidate: _Vector, reference: _Vector) -> float:
  """Return the CIDEr-D similarity, from 0 to 1."""
  products = [0.0] * _ORDER
  for ngram, weight in candidate.weights.items():
    other = reference.weights.get(ngram, 0.0)
    products[len(ngram) - 1] += min(weight, other) * other
  cosines = [
    product / (a * b) if a and b else 0.0
    for product, a, b in zip(products, candidate.norms, reference.norms, strict=True)
  ]
  distance = candidate.length - reference.length
  return statistics.fmean(cosines) * math.exp(-(distance**2) / (2 * _SIGMA**2))


def _tokens(
  candidates: Sequence[str], references: Sequence[Sequence[str]], tokenise: Tokenise
) -> list[tuple[list[str], list[list[str]]]]:
  if isinstance(candidates, str) or len(candidates) != len(references):
    raise ValueError(
      f"{len(candidates)} candidates and {len(references)} lists of references; give each its own."
    )
  pairs = []
  for i, (text, truths) in enumerate(zip(candidates, references, strict=True)):
    if isinstance(truths, str) or not truths:
      raise ValueError(f"references[{i}] is {truths!r}; expected a list of at least one caption.")
    pairs.append(compared_words(text, truths, tokenise))
  return pairs


def _ngrams(words: Sequence[str]) -> collections.Counter[tuple[str, ...]]:
  """Return the counts of all n-grams of 1 to 4 words."""
  return collections.Counter(
    tuple(words[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(words) - n + 1)
  )
