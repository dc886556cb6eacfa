import math

import numpy as np
import pytest

from ov_eval import caption_scores as metrics
from ov_eval.caption_scores import bleu4, cider, cider_scores
from ov_eval.captions import CaptionRecord

CAT = "the cat is on the mat"


def test_perfect_caption():
  assert bleu4([CAT], [["something else entirely here", CAT]]).value == pytest.approx(1.0)


def test_bleu_example():
  # First caption: 5 of 6 1-grams match, 3 of 5 2-grams (the cat, on the, the mat), 1 of 4 3-grams
  # and 0 of 3 4-grams, so its BLEU-4 alone is 0. With the second caption, 3 of 6 4-grams match.
  state = bleu4(["the cat sat on the mat", CAT], [[CAT], [CAT]])
  assert state.sums.tolist() == [11, 8, 5, 3, 12, 10, 8, 6, 12, 12]
  expected = (11 / 12 * 8 / 10 * 5 / 8 * 3 / 6) ** 0.25
  assert state.value == pytest.approx(expected)
  assert state.brevity_penalty == 1.0
  assert bleu4(["the cat sat on the mat"], [[CAT]]).value == 0.0


def test_bleu_clips_matches_per_reference():
  # Papineni's example: "the" is twice in the first reference, once in the second.
  state = bleu4(["the the the the the the the"], [[CAT, "there is a cat on the mat"]])
  assert state.sums[0] == 2 and state.sums[4] == 7


@pytest.mark.parametrize(
  "words, lengths, closest",
  [(5, (2, 9), 2), (5, (4, 6), 4), (5, (6, 4), 4), (5, (9, 7, 1), 7), (0, (3, 8), 3)],
)
def test_bleu_uses_the_closest_reference_length(words, lengths, closest):
  state = bleu4([" ".join(["a"] * words)], [[" ".join(["b"] * n) for n in lengths]])
  assert state.sums[8:].tolist() == [words, closest]


def test_bleu_brevity_penalty():
  state = bleu4(["a b c d"], [["a b c d e f"]])
  assert state.value == pytest.approx(math.exp(1 - 6 / 4))


def test_bleu_empty_candidates():
  assert bleu4([""], [["a b c d"]]).value == 0.0
  state = bleu4(["a b c d", ""], [["a b c d"], ["a b c d"]])
  assert state.value == pytest.approx(math.exp(1 - 8 / 4)) and state.count == 2
  assert math.isnan(bleu4([], []).value)
  assert bleu4([], []).result().low is None


def _random_captions(seed, size, vocabulary=12):
  rng = np.random.default_rng(seed)
  words = np.array([f"w{i}" for i in range(vocabulary)])

  def caption():
    return " ".join(rng.choice(words, rng.integers(4, 12)))

  references = [[caption() for _ in range(rng.integers(1, 6))] for _ in range(size)]
  candidates = []
  for truths in references:
    text = truths[0].split()
    text[rng.integers(len(text))] = str(rng.choice(words))
    candidates.append(" ".join(text[: rng.integers(3, len(text) + 1)]))
  return candidates, references


def test_bleu_merges_exactly():
  candidates, references = _random_captions(0, 60)
  whole = bleu4(candidates, references)
  parts = bleu4(candidates[:17], references[:17]) + bleu4(candidates[17:], references[17:])
  assert (parts.value, parts.interval(), parts.count) == (whole.value, whole.interval(), 60)
  twice = bleu4(candidates * 2, references * 2)
  assert twice.value == pytest.approx(whole.value)
  widths = [np.diff(state.interval())[0] for state in (twice, whole)]
  assert widths[0] == pytest.approx(widths[1] / math.sqrt(2))


def test_bleu_interval_agrees_with_bootstrap():
  candidates, references = _random_captions(1, 150)
  state = bleu4(candidates, references)
  rows = np.array([bleu4([c], [r]).sums for c, r in zip(candidates, references, strict=True)])
  rng = np.random.default_rng(2)
  sums = rows[rng.integers(0, len(rows), (2000, len(rows)))].sum(1)
  boot = np.exp(
    np.log(sums[:, :4] / sums[:, 4:8]).mean(1) + np.minimum(0, 1 - sums[:, 9] / sums[:, 8])
  )
  # 2000 draws give a 2.5% quantile to about 0.06 standard errors.
  np.testing.assert_allclose(
    state.interval(), np.quantile(boot, [0.025, 0.975]), atol=0.2 * boot.std()
  )


def test_cider_example():
  # Two images. "a" occurs in both and has idf 0; all other n-grams occur in one and have idf log 2.
  references = [["a red dog"], ["a big cat"]]
  # Candidates equal to the references: cosine 1 for n = 1, 2, 3; there is no 4-gram.
  np.testing.assert_allclose(cider_scores(["a red dog", "a big cat"], references), 7.5)
  # "a red cat" against "a red dog": the cosine is 1/2 for 1-grams (red, cat against red, dog) and
  # for 2-grams ("a red", "red cat" against "a red", "red dog"). "a dog" against "a red dog": it is
  # 1/sqrt 2 for 1-grams and 0 for others, and the lengths differ by one word.
  found = cider_scores(["a red cat", "a dog"], references)
  assert found[0] == pytest.approx(10 * (1 / 2 + 1 / 2) / 4)
  assert found[1] == 0.0  # reference of the other image
  found = cider_scores(["a dog", "a big cat"], references)
  assert found[0] == pytest.approx(10 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))


def test_cider_clips_a_repeated_word():
  references = [["dog park"], ["big cat"]]
  # tf of "dog" is 3, clipped to 1: 1 x 1 / (|3| x |(1, 1)|). The lengths differ by one 2-gram.
  found = cider_scores(["dog dog dog", ""], references)
  assert found[0] == pytest.approx(10 * (1 / (3 * math.sqrt(2))) / 4 * math.exp(-1 / 72))
  assert found[1] == 0.0  # an empty candidate


def test_cider_is_the_mean_over_references():
  references = [["red dog", "blue bird"], ["big cat"]]
  found = cider_scores(["red dog", "x"], references)
  assert found[0] == pytest.approx(10 * (2 / 4 + 0) / 2)


def test_cider_of_one_image_is_zero():
  assert cider(["a red dog"], [["a red dog"]]).value == 0.0
  assert math.isnan(cider([], []).value)


def test_cider_of_duplicated_images():
  candidates, references = _random_captions(3, 40)
  once = cider(candidates, references)
  twice = cider(candidates * 2, references * 2)  # N and every df double, so idf is unchanged
  assert once.value > 0 and twice.count == 80
  # N-grams in no reference have idf log N, so only their weight increases.
  assert twice.value == pytest.approx(once.value, rel=0.15) and twice.value <= once.value


def _naive_cider(candidates, references):
  """Compute CIDEr-D by its formula, with one dense vector per n."""
  total = []
  for i, candidate in enumerate(candidates):
    scores = []
    for truth in references[i]:
      cosines = []
      for n in range(1, 5):
        grams = sorted({g for t in [candidate, truth] for g in _grams(t, n)})
        df = [sum(any(g in _grams(t, n) for t in texts) for texts in references) for g in grams]
        idf = np.log(len(references)) - np.log(np.maximum(df, 1))
        c, r = (np.array([_grams(t, n).count(g) for g in grams]) * idf for t in (candidate, truth))
        norm = np.linalg.norm(c) * np.linalg.norm(r)
        cosines.append(np.minimum(c, r) @ r / norm if norm else 0.0)
      gap = len(candidate.split()) - len(truth.split())
      scores.append(np.mean(cosines) * np.exp(-(gap**2) / 72))
    total.append(10 * np.mean(scores))
  return total


def _grams(text, n):
  words = text.split()
  return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_cider_equals_the_formula():
  candidates, references = _random_captions(4, 25)
  found = cider_scores(candidates, references)
  np.testing.assert_allclose(found, _naive_cider(candidates, references), rtol=1e-12)
  assert len(set(found.tolist())) > 20


def test_duplicate_records_count_once():
  candidates, references = _random_captions(5, 20)
  records = [CaptionRecord(i, candidates[i], tuple(references[i])) for i in range(20)]
  once = metrics.caption_metrics(records)
  assert metrics.caption_metrics([*records, records[3], records[3]]) == once
  assert [(r.name, r.count) for r in once] == [("bleu4", 20), ("cider", 20)]
  assert once[0].value == bleu4(candidates, references).value
  assert metrics.caption_metrics([]) == []


@pytest.mark.parametrize(
  "candidates, references, message",
  [
    (["a"], [], "1 candidates and 0 lists"),
    (["a"], [[]], r"references\[0\] is \[\]"),
    (["a"], ["a cat"], r"references\[0\] is 'a cat'"),
    ("a", ["a"], "1 candidates"),
  ],
)
def test_invalid_arguments(candidates, references, message):
  for metric in (bleu4, cider):
    with pytest.raises(ValueError, match=message):
      metric(candidates, references)
