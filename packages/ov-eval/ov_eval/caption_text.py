"""Word tokenization of captions that makes generated and reference captions comparable.

A generated caption is detokenized text: case, accents and spacing around punctuation may be lost.
A reference caption is the original text of the data set. `compared_words` removes these
differences from both, so that a model that reproduces a reference gets the maximum score.
"""

from collections.abc import Callable, Sequence
import functools
import re
import unicodedata

import regex

Tokenise = Callable[[str], Sequence[str]]

UNKNOWN = "\0unknown"  # token of an unknown word; occurs in no text, so it matches nothing
# Names of special tokens in generated captions. In a reference these are ordinary characters.
_NO_TEXT = re.compile(r"\[(?:UNK|SEP|MASK|CLS|PAD|unused\d+)\]|<unk>|<mask>")

_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts without spaces between words: each letter with its marks is a token.
_SCRIPTS = "".join(
  rf"\p{{{script}}}"
  for script in (
    "Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Javanese",
    "Balinese", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet",
  )
)  # fmt: skip
_SPACELESS = rf"[{_SCRIPTS}\u30fc]"  # U+30FC, the Japanese length mark, has no script in Unicode
_LETTER = rf"(?=[\p{{L}}\p{{N}}]){_SPACELESS}\p{{M}}*+"
_RUN = rf"[\p{{L}}\p{{N}}--{_SPACELESS}][[\p{{L}}\p{{N}}\p{{M}}]--{_SPACELESS}]*+"
_EMOJI = r"[\p{Extended_Pictographic}\U0001f1e6-\U0001f1ff]"
_WORD = regex.compile(f"{_LETTER}|{_RUN}|{_EMOJI}", regex.V1)
_IGNORED = regex.compile(r"\p{Default_Ignorable_Code_Point}")  # soft hyphens, joiners, ...
_MARK = regex.compile(r"\p{Mn}")


def caption_words(text: str, *, marks: bool = True) -> list[str]:
  """Split a caption into words, ignoring case, punctuation, symbols and spacing.

  Text is NFKC-normalised and case-folded. A word is a run of letters, digits and marks, so "don't"
  is "don" and "t", however it is spaced. In scripts without spaces between words (Chinese,
  Japanese, Thai, Lao, Khmer, Burmese, ...) each letter with its marks is a word, and so is each
  emoji.

  Args:
    text: the caption.
    marks: whether to keep nonspacing marks: accents, and the vowel signs of many scripts.

  >>> caption_words("The dog's well-lit; it costs $3.50!")
  ['the', 'dog', 's', 'well', 'lit', 'it', 'costs', '3', '50']
  >>> caption_words("Café à Tokyo"), caption_words("Café à Tokyo", marks=False)
  (['café', 'à', 'tokyo'], ['cafe', 'a', 'tokyo'])
  """
  if text.isascii():
    return _ASCII_WORD.findall(text.lower())
  plain = _folded(text)
  plain = unicodedata.normalize("NFC", plain if marks else _MARK.sub("", plain))
  return _WORD.findall(plain)


def compared_words(
  candidate: str, references: Sequence[str], tokenise: Tokenise = caption_words
) -> tuple[list[str], list[list[str]]]:
  """Return comparable words of a generated caption and of its references.

  With `caption_words`, nonspacing marks count only if the candidate has any, because a tokenizer
  that strips accents cannot generate them. A special token in the candidate ("[UNK]") becomes a
  word that matches nothing.

  Args:
    candidate: generated caption.
    references: reference captions.
    tokenise: maps a text to tokens.

  Returns:
    Tokens of the candidate, and tokens of each reference.
  """
  if tokenise is caption_words:
    has_marks = not candidate.isascii() and bool(_MARK.search(_folded(candidate)))
    tokenise = functools.partial(caption_words, marks=has_marks)
  first, *more = _NO_TEXT.split(candidate)
  words = list(tokenise(first))
  for part in more:
    words += [UNKNOWN, *tokenise(part)]
  return words, [list(tokenise(text)) for text in references]


def is_exact(candidate: str, references: Sequence[str]) -> bool:
  """Return whether a generated caption has the same words as one of its references.

  Captions without words, such as "!?", are compared literally up to whitespace.
  """
  words, truths = compared_words(candidate, references)
  if words:
    return UNKNOWN not in words and words in truths
  return candidate.split() in [text.split() for text in references]


def _folded(text: str) -> str:
  """Return the text decomposed (NFKD), case-folded and without invisible characters."""
  plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
  return _IGNORED.sub("", plain)
