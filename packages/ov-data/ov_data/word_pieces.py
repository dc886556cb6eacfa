"""Deterministic WordPiece vocabulary training from word counts.

The trainers of the `tokenizers` library break ties by hash order, so two runs over the same texts
give different vocabularies (checked with 0.23.3). Here ties are broken by the text.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
import heapq

PREFIX = "##"  # marks a piece that continues a word

_Pair = tuple[str, str]


def frequent_words(counts: Mapping[str, int], size: int, min_frequency: int) -> list[str]:
  """Return the most frequent words, at most `size`, with at least `min_frequency` occurrences."""
  return _ranked(counts, min_frequency)[:size]


def word_pieces(counts: Mapping[str, int], size: int, min_frequency: int) -> list[str]:
  """Return a WordPiece vocabulary learned by byte-pair merges.

  Words start as pieces "w", "##o", "##r", "##d". The most frequent pair of adjacent pieces over all
  words is merged repeatedly.
  Paper: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1.

  Args:
    counts: number of occurrences of each word.
    size: maximum vocabulary size. If there are more characters, only the most frequent are kept,
      and words with other characters remain unknown.
    min_frequency: minimum frequency of added pieces.
  """
  alphabet: Counter[str] = Counter()
  for word, count in counts.items():
    for piece in _spell(word):
      alphabet[piece] += count
  vocabulary = dict.fromkeys(_ranked(alphabet, min_frequency)[:size])
  spelt = [(_spell(word), count) for word, count in sorted(counts.items())]
  spelt = [(pieces, count) for pieces, count in spelt if all(p in vocabulary for p in pieces)]

  pair_counts: Counter[_Pair] = Counter()
  where: defaultdict[_Pair, set[int]] = defaultdict(set)
  for i, (pieces, count) in enumerate(spelt):
    for pair in zip(pieces, pieces[1:]):
      pair_counts[pair] += count
      where[pair].add(i)
  # The heap contains a pair for every count that it ever had; stale counts are ignored.
  heap = [(-count, pair) for pair, count in pair_counts.items()]
  heapq.heapify(heap)
  while heap and len(vocabulary) < size:
    negative, pair = heapq.heappop(heap)
    if -negative != pair_counts[pair]:
      continue
    if -negative < min_frequency:
      break
    merged = pair[0] + pair[1].removeprefix(PREFIX)
    vocabulary.setdefault(merged)
    changed: set[_Pair] = set()
    for i in where.pop(pair):
      pieces, count = spelt[i]
      new = _merge(pieces, pair, merged)
      for old_pair in zip(pieces, pieces[1:]):
        pair_counts[old_pair] -= count
        changed.add(old_pair)
      for new_pair in zip(new, new[1:]):
        pair_counts[new_pair] += count
        where[new_pair].add(i)
        changed.add(new_pair)
      spelt[i] = (new, count)
    for other in changed:
      if pair_counts[other] > 0:
        heapq.heappush(heap, (-pair_counts[other], other))
  return list(vocabulary)


def _ranked(counts: Mapping[str, int], min_frequency: int) -> list[str]:
  kept = [item for item in counts.items() if item[1] >= min_frequency]
  return [text for text, _ in sorted(kept, key=lambda item: (-item[1], item[0]))]


def _spell(word: str) -> list[str]:
  return [word[0], *(PREFIX + c for c in word[1:])]


def _merge(pieces: list[str], pair: _Pair, merged: str) -> list[str]:
  out: list[str] = []
  i = 0
  while i < len(pieces):
    if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair:
      out.append(merged)
      i += 2
    else:
      out.append(pieces[i])
      i += 1
  return out
