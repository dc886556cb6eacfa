import numpy as np
import pytest

from ov_eval.captions import (
  CaptionRecord,
  attribute_accuracy,
  caption_statistics,
  generate_captions,
)

WORDS = ["", "red", "blue", "square", "circle", "a"]


def _detokenize(ids):
  return " ".join(WORDS[i] for i in ids if i)


def _batches():
  for batch in _id_batches():
    yield {**batch, "references": [(_detokenize(ids),) for ids in batch["ids"]]}


def _id_batches():
  yield {
    "index": np.array([10, 11, 12]),
    "valid": np.array([True, False, True]),
    "ids": np.array([[5, 1, 3], [5, 2, 4], [5, 2, 3]]),
  }
  yield {
    "index": np.array([13, 14, 15]),
    "valid": np.array([False, True, True]),
    "ids": np.array([[5, 1, 3], [5, 1, 4], [5, 2, 4]]),
  }


def _generate(batch):
  return np.where(np.arange(3) == 1, 1, batch["ids"])  # all captions say "red"


def test_padding_has_no_record():
  records = generate_captions(_generate, _detokenize, _batches())
  assert [r.index for r in records] == [10, 12, 14, 15]
  assert records[1] == CaptionRecord(12, "a red square", ("a blue square",), {})


def test_limit_stops_reading():
  read = []

  def batches():
    for batch in _batches():
      read.append(1)
      yield batch

  assert len(generate_captions(_generate, _detokenize, batches(), limit=2)) == 2
  assert len(read) == 1
  assert len(generate_captions(_generate, _detokenize, batches(), limit=3)) == 3


def test_extras_and_references_of_the_batch():
  batch = {"index": np.array([3]), "valid": np.array([True]), "references": [("one", "two")]}
  batch["ids"] = np.array([[5, 1, 3]])
  (record,) = generate_captions(
    _generate, _detokenize, [batch], extras=lambda batch, row: {"row": row}
  )
  assert record.references == ("one", "two") and record.extras == {"row": 0}


def test_references_are_required():
  with pytest.raises(ValueError, match="a batch has index, valid, ids, but no references"):
    generate_captions(_generate, _detokenize, _id_batches())


def test_records_of_several_processes():
  other = [CaptionRecord(99, "x", ("x",))]
  calls = []

  def gather(mine):
    calls.append(len(mine))
    return [mine, other]

  records = generate_captions(_generate, _detokenize, _batches(), limit=3, gather=gather)
  assert [r.index for r in records] == [10, 12, 99]
  assert calls == [2]


def _score(record):
  _, colour, shape = record.references[0].split()
  right = {"colour": colour in record.generated, "shape": shape in record.generated}
  return {kind: (int(value), 1) for kind, value in right.items()}


def test_attribute_accuracy():
  records = generate_captions(_generate, _detokenize, _batches())
  accuracy = attribute_accuracy(records, _score)
  colours = [record.references[0].split()[1] == "red" for record in records]
  assert accuracy.by_kind["colour"].value == np.mean(colours)
  assert accuracy.by_kind["shape"].value == 1.0
  assert accuracy.overall.value == (sum(colours) + 4) / 8
  assert accuracy.overall.weight == 8 and accuracy.overall.count == 4
  assert accuracy.all_correct.value == accuracy.exact_match.value == np.mean(colours)
  names = [r.name for r in accuracy.results()]
  assert names[:3] == [
    "attribute_accuracy",
    "attribute_accuracy/colour",
    "attribute_accuracy/shape",
  ]


def test_records_without_attributes_count_for_exact_match_only():
  records = [CaptionRecord(0, "A  red square", ("a red square",)), CaptionRecord(1, "x", ("y",))]
  accuracy = attribute_accuracy(records, lambda r: {} if r.index else {"colour": (1, 1)})
  assert accuracy.overall.count == 1 and accuracy.all_correct.value == 1.0
  assert accuracy.exact_match.value == 0.5
  without_truth = attribute_accuracy(records, lambda r: {})
  assert [r.name for r in without_truth.results()] == ["exact_match"]


def test_statistics_of_repeated_captions():
  records = [CaptionRecord(i, "a cat", (f"cat number {i}",)) for i in range(4)]
  stats = {r.name: r.value for r in caption_statistics(records)}
  assert stats == {
    "caption_words": 2.0,
    "reference_words": 3.0,
    "distinct_captions": 0.25,
    "distinct_references": 1.0,
  }
  assert caption_statistics([]) == []


def test_statistics_without_references():
  stats = {r.name: r.value for r in caption_statistics([CaptionRecord(0, "a cat", ())])}
  assert stats == {"caption_words": 2.0, "distinct_captions": 1.0}


def test_several_attributes_of_a_kind():
  records = [CaptionRecord(i, "x", ("y",)) for i in range(3)]
  scores = [{"colour": (1, 2), "shape": (2, 2)}, {"colour": (0, 1)}, {"colour": (2, 2)}]
  accuracy = attribute_accuracy(records, lambda r: scores[r.index])
  assert accuracy.overall.value == 5 / 7
  assert accuracy.by_kind["colour"].value == 3 / 5 and accuracy.by_kind["shape"].count == 1
  assert accuracy.all_correct.value == 1 / 3
