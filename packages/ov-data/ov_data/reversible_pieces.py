"""Reversible WordPiece text preparation for tokenizers trained on custom captions.

The text preparation of the published models (`bert`) removes accents and vowel signs and loses the
spaces around punctuation. This one only normalizes texts to NFC, lower case and single spaces. A
word without a space before it begins with a joiner: "don't" is `don`, `￭'`, `￭t`.
"""

from collections.abc import Sequence
import re
import string

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ov_data import word_pieces

MAX_WORD_CHARS = 256  # longer words are [UNK]; encoding time is quadratic in the length
JOINER = "\uffed"  # as in OpenNMT's joiner annotation; replaced by U+25A0 in texts

# Invisible characters without meaning for words. The joiners of Indic and Persian spelling and of
# emoji (U+200C, U+200D) and variation selectors are kept.
_INVISIBLE = r"[\u00AD\u200B\u200E\u200F\u202A-\u202E\u2060-\u2064\u2066-\u206F\uFEFF]"
_ALONE = r"\p{P}\p{S}\p{Han}"  # each character is a word
# Scripts without spaces between words. A vocabulary of words must contain their letters.
_SPACELESS = "".join(
  rf"\p{{{script}}}" for script in ("Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_ALONE_WORD = re.compile(  # Thai, Lao; Burmese; Khmer; Chinese, Japanese; including marks
  r"[^\w\s]|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff].*"
)
_PUNCTUATION = re.escape(string.punctuation)
_ASCII_JOINT = re.compile(rf"(?<=\S)(?=[{_PUNCTUATION}])|(?<=[{_PUNCTUATION}])(?=\S)")


def normalizer(*, strip_accents: bool, letters: bool) -> normalizers.Normalizer:
  """Return the normalizer.

  Args:
    strip_accents: whether to remove accents and all other nonspacing marks, including the vowel
      signs of many scripts.
    letters: whether each letter of a script without spaces between words is a word.
  """
  joints = [rf"(?<=\S)(?=[{_ALONE}])", rf"(?<=[{_ALONE}])(?=\S)"]
  if letters:
    joints += [
      rf"(?<=\S)(?=(?=[\p{{L}}\p{{N}}])[{_SPACELESS}])",
      rf"(?<=[{_SPACELESS}])(?=[\p{{L}}\p{{N}}&&[^{_SPACELESS}]])",
    ]
  steps: list[normalizers.Normalizer] = []
  if strip_accents:
    steps = [normalizers.NFD(), normalizers.Replace(tokenizers.Regex(r"\p{Mn}"), "")]
  return normalizers.Sequence(
    [
      *steps,
      normalizers.NFC(),
      normalizers.Replace(tokenizers.Regex(_INVISIBLE), ""),
      normalizers.Replace(tokenizers.Regex(r"\p{Cc}"), " "),
      normalizers.Lowercase(),
      normalizers.NFC(),
      normalizers.Replace(JOINER, "\u25a0"),
      normalizers.Replace(tokenizers.Regex("|".join(joints)), f" {JOINER}"),
    ]
  )


def splitter() -> pre_tokenizers.PreTokenizer:
  """Return the pre-tokenizer that splits a normalized text into words."""
  return pre_tokenizers.WhitespaceSplit()


def join_ascii(text: str) -> str:
  """Insert joiners into a lower-case ASCII text, like `normalizer`."""
  return _ASCII_JOINT.sub(f" {JOINER}", text)


def spelling_tokens(tokens: Sequence[str], *, letters: bool) -> list[str]:
  """Return additional tokens that allow a vocabulary to spell its letters in new contexts.

  Args:
    tokens: tokens of the vocabulary.
    letters: whether it is a vocabulary of words. The result then contains punctuation marks and
      letters of scripts without spaces, with and without joiner. Otherwise it contains all letters,
      at the beginning of and within words, and the joiner.
  """
  known = set(tokens)
  if letters:
    plain = dict.fromkeys(token.removeprefix(JOINER) for token in tokens)
    alone = [word for word in plain if _ALONE_WORD.fullmatch(word)]
    wanted = [form for word in alone for form in (word, JOINER + word)]
  else:
    characters = dict.fromkeys(
      c for token in tokens for c in token.removeprefix(word_pieces.PREFIX)
    )
    characters.pop(JOINER, None)
    wanted = [JOINER, *(form for c in characters for form in (c, word_pieces.PREFIX + c))]
  return [token for token in wanted if token not in known]


def backend(
  vocabulary: dict[str, int], *, strip_accents: bool, letters: bool
) -> tokenizers.Tokenizer:
  """Return a WordPiece tokenizer over a vocabulary with this text preparation and its decoder."""
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece(
      vocabulary,
      unk_token="[UNK]",
      max_input_chars_per_word=MAX_WORD_CHARS,
      continuing_subword_prefix=word_pieces.PREFIX,
    )
  )
  tokenizer.normalizer = normalizer(strip_accents=strip_accents, letters=letters)
  tokenizer.pre_tokenizer = splitter()
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.WordPiece(prefix=word_pieces.PREFIX, cleanup=False),
      decoders.Fuse(),
      decoders.Replace(f" {JOINER}", ""),
      decoders.Replace(JOINER, ""),  # a generated caption may begin with a joined piece
    ]
  )
  return tokenizer
