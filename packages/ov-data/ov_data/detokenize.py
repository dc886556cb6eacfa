"""Detokenization of BERT words, which are split at punctuation without keeping spaces.

Spaces follow the usual rules of English and other European languages: "man ' s" becomes "man's",
"$ 3. 50" becomes "$3.50", "well - lit" becomes "well-lit". Chinese and Japanese characters are
joined. Ambiguous cases ("red - brown", "red - a colour") are guessed.
"""

from collections.abc import Sequence
import re

import tokenizers
from tokenizers import decoders, pre_tokenizers

from ov_data import word_pieces

_CLOSING = frozenset(".,;:!?)]}%…。、」』》）】”’»")
_OPENING = frozenset("([{$€£¥#¿¡“‘«「『《（【")
_JOINING = frozenset("-/_–—‐‑@\\")  # join the words on both sides
_PAIRED = frozenset("\"'`")
_CLITICS = frozenset(("s", "t", "re", "ve", "ll", "d", "m", "em", "n"))
_ELISIONS = frozenset(
  ("l", "d", "j", "m", "n", "s", "t", "c", "o", "qu", "jusqu", "lorsqu", "puisqu", "quelqu",
   "aujourd", "dell", "all", "nell", "sull", "un", "quest")
)  # fmt: skip
_EAST_ASIAN = re.compile(
  "[\u3005\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def splits_as_bert(tokenizer: tokenizers.Tokenizer) -> bool:
  """Return whether a tokenizer splits words and marks pieces like BERT."""
  splitter, decoder = tokenizer.pre_tokenizer, tokenizer.decoder
  return (
    isinstance(splitter, pre_tokenizers.BertPreTokenizer)
    and isinstance(decoder, decoders.WordPiece)
    and decoder.prefix == word_pieces.PREFIX
  )


def join_pieces(pieces: Sequence[str]) -> str:
  """Return the text of WordPiece tokens."""
  words: list[str] = []
  for piece in pieces:
    if words and piece.startswith(word_pieces.PREFIX):
      words[-1] += piece.removeprefix(word_pieces.PREFIX)
    elif piece:
      words.append(piece)
  return join_words(words)


def join_words(words: Sequence[str]) -> str:
  """Return the text of words; each punctuation mark is a word."""
  text = ""
  open_quotes: set[str] = set()
  glued = True  # whether the next word follows without a space
  for i, word in enumerate(words):
    before = words[i - 1] if i else ""
    after = words[i + 1] if i + 1 < len(words) else ""
    left, right = _sides(before, word, after, open_quotes)
    text += word if glued or left else f" {word}"
    glued = right
  return text


def _sides(before: str, word: str, after: str, open_quotes: set[str]) -> tuple[bool, bool]:
  """Return whether to omit the space before and the space after a word."""
  between = _is_word(before) and _is_word(after)
  if word == "'" and between and (after in _CLITICS or before in _ELISIONS):
    return True, True
  if word == "'" and before.endswith("s") and word not in open_quotes:
    return True, False  # possessive: the dogs' ball
  if word in _PAIRED:
    if word in open_quotes:
      open_quotes.remove(word)
      return True, False
    open_quotes.add(word)
    return False, True
  if word in (".", ",", ":") and before[-1:].isdigit() and after[:1].isdigit():
    return True, True
  if word in _JOINING:
    return between, between
  if word in _CLOSING:
    return True, False
  if word in _OPENING:
    return False, True
  return bool(before and _EAST_ASIAN.match(before[-1]) and _EAST_ASIAN.match(word)), False


def _is_word(text: str) -> bool:
  return text[:1].isalnum()
