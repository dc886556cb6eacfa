"""Detokenization of BERT words."""

import pytest

from ov_data.detokenize import join_pieces
from ov_data.tokenizer import Tokenizer

_SENTENCES = [
  "a man's hand on a black-and-white photo",
  "two dogs don't share the frisbee; they're fast, aren't they?",
  "it's $3.50, or 1,000 euros, at 10:30!",
  "the dogs' ball is red.",
  'a sign that says "stop" (in red)',
  "l'eglise d'un village, aujourd'hui",
  "the word 'stop' on a sign",
  "and/or 50% of #1",
  "wait... what?",
  "東京タワーと赤い車。",
  "una foto: ¿qué es?".replace("é", "e"),
  "plain words",
  "",
]


@pytest.mark.parametrize("text", _SENTENCES)
def test_decode_restores_usual_spaces(tmp_path, text: str):
  characters = dict.fromkeys("".join(_SENTENCES).replace(" ", ""))
  tokens = ["[PAD]", "[bos]", "[eos]", "[UNK]", *characters, *(f"##{c}" for c in characters)]
  (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
  tokenizer = Tokenizer.from_vocab(tmp_path / "vocab.txt")
  assert tokenizer.decode(tokenizer.encode_batch([text], 90)[0][0]) == text


@pytest.mark.parametrize(
  ("pieces", "text"),
  [
    (["##ing", "a"], "##ing a"),  # generated rows may begin with a continuation
    (["", "run", "##ning"], "running"),
    (["'", "a"], "'a"),
    (["a", '"'], 'a "'),
    (["-", "a", "-"], "- a -"),
    (["[UNK]", "'", "s", "[UNK]"], "[UNK] 's [UNK]"),
    ([], ""),
  ],
)
def test_unusual_rows(pieces, text):
  assert join_pieces(pieces) == text
