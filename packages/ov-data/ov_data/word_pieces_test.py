"""Vocabulary training compared with a reference that recounts all pairs at every merge."""

from collections import Counter
import random

import pytest

from ov_data import word_pieces


def _plain(counts: dict[str, int], size: int, min_frequency: int) -> list[str]:
  alphabet: Counter[str] = Counter()
  for word, count in counts.items():
    for i, c in enumerate(word):
      alphabet[c if i == 0 else "##" + c] += count
  ranked = sorted(alphabet, key=lambda p: (-alphabet[p], p))
  vocabulary = [p for p in ranked if alphabet[p] >= min_frequency][:size]
  words = {w: [w[0], *("##" + c for c in w[1:])] for w in counts}
  words = {w: p for w, p in words.items() if set(p) <= set(vocabulary)}
  while len(vocabulary) < size:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, pieces in words.items():
      for pair in zip(pieces, pieces[1:]):
        pairs[pair] += counts[word]
    if not pairs:
      break
    pair = min(pairs, key=lambda p: (-pairs[p], p))
    if pairs[pair] < min_frequency:
      break
    merged = pair[0] + pair[1][2:]
    if merged not in vocabulary:
      vocabulary.append(merged)
    for pieces in words.values():
      i = 0
      while i + 1 < len(pieces):
        if (pieces[i], pieces[i + 1]) == pair:
          pieces[i : i + 2] = [merged]
        i += 1
  return vocabulary


@pytest.mark.parametrize("seed", range(20))
def test_equals_recounting(seed: int):
  rng = random.Random(seed)
  counts = {"".join(rng.choices("abc", k=rng.randint(1, 9))): rng.randint(1, 5) for _ in range(40)}
  size, min_frequency = rng.randint(2, 80), rng.randint(1, 4)
  expected = _plain(counts, size, min_frequency)
  assert word_pieces.word_pieces(counts, size, min_frequency) == expected
  shuffled = dict(rng.sample(list(counts.items()), len(counts)))
  assert word_pieces.word_pieces(shuffled, size, min_frequency) == expected


def test_repeated_letters():
  pieces = word_pieces.word_pieces({"aaaa": 10}, 9, 1)
  assert pieces == ["##a", "a", "##aa", "##aaa", "aaaa"]
