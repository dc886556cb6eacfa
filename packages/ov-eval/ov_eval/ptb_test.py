"""Tests of COCO tokens against the output of the Penn Treebank tokenizer."""

import doctest
import json
import pathlib

import pytest

from ov_eval import ptb
from ov_eval.caption_scores import bleu4, caption_metrics
from ov_eval.captions import CaptionRecord
from ov_eval.ptb import ptb_words

# The file describes how it was generated.
_GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "testdata" / "ptb_words.json").read_text("utf-8")
)["captions"]


def test_examples():
  assert doctest.testmod(ptb).failed == 0


def test_tokens_equal_the_coco_code():
  assert len(_GOLDEN) > 400
  different = [
    (text, ptb_words(text), tokens)
    for text, tokens in _GOLDEN
    if " ".join(ptb_words(text)) != tokens
  ]
  assert not different


@pytest.mark.parametrize(
  "text", ["", " ", "'", "\0", "\ud800", "-" * 9, "'" * 9, "a\nb", "&amp;" * 3]
)
def test_unusual_texts(text):
  assert all(word and " " not in word for word in ptb_words(text))


def test_metrics_with_ptb_tokens():
  records = [
    CaptionRecord(0, "a man 's well-lit room", ("A man's well-lit room.",)),
    CaptionRecord(1, "a red [UNK] dog runs", ("A red big dog runs",)),
  ]
  found = {r.name: r.value for r in caption_metrics(records[:1], tokens="ptb")}
  assert found["bleu4"] == 1.0
  state = bleu4(["a red [UNK] dog"], [["a red [UNK] dog"]], tokenise=ptb_words)
  assert state.sums[:2].tolist() == [3, 1]
  with pytest.raises(ValueError, match="tokens='xyz': expected one of words, ptb"):
    caption_metrics(records, tokens="xyz")
