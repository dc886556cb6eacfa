"""WordPiece for tokenizers trained on own captions: decoding gives back the text that was encoded.

The published models' text preparation (`bert`) removes accents and vowel signs, and forgets where
spaces were around punctuation. Here texts are normalised (NFC), in lower case and with single
spaces, and nothing else is lost: where a word was joined to the one before it, its piece begins
with a joiner. "don't" is `don`, `￭'`, `￭t`.
"""

from collections.abc import Sequence
import re
import string

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ov_data import word_pieces

MAX_WORD_CHARS = 256  # a longer word is [UNK]; the time to encode one grows with the square
JOINER = "\uffed"  # as in OpenNMT's joiner annotation; in texts it becomes the usual black square

# Not displayed, and without a meaning for words. The joiners of Indic and Persian spelling and of
# emoji (U+200C, U+200D) and variation selectors stay.
_INVISIBLE = r"[\u00AD\u200B\u200E\u200F\u202A-\u202E\u2060-\u2064\u2066-\u206F\uFEFF]"
_ALONE = r"\p{P}\p{S}\p{Han}"  # a word each
# Scripts without spaces between words. A vocabulary of whole words has to know their letters.
_SPACELESS = "".join(
  rf"\p{{{script}}}" for script in ("Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_ALONE_WORD = re.compile(  # Thai, Lao; Burmese; Khmer; Chinese and Japanese; with their marks
  r"[^\w\s]|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff].*"
)
_PUNCTUATION = re.escape(string.punctuation)
_ASCII_JOINT = re.compile(rf"(?<=\S)(?=[{_PUNCTUATION}])|(?<=[{_PUNCTUATION}])(?=\S)")


def normalizer(*, strip_accents: bool, letters: bool) -> normalizers.Normalizer:
  """Return the text preparation.

  Args:
    strip_accents: whether to remove accents and all other nonspacing marks, the vowel signs of many
      scripts among them.
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
  """Return what splits a normalised text into words."""
  return pre_tokenizers.WhitespaceSplit()


def join_ascii(text: str) -> str:
  """Put joiners into an ASCII text in lower case, as `normalizer` does."""
  return _ASCII_JOINT.sub(f" {JOINER}", text)


def other_forms(tokens: Sequence[str], *, letters: bool) -> list[str]:
  """Return tokens that let a vocabulary write its letters where the texts did not have them.

  Args:
    tokens: of the vocabulary.
    letters: whether it is one of whole words. Then these are marks of punctuation and letters of
      scripts without spaces, joined and not joined. Else they are all letters, at the beginning of
      a word and within one, and the joiner.
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
  """Return WordPiece over a vocabulary with this text preparation, and the decoder of it."""
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
      decoders.Replace(JOINER, ""),  # where a generated caption begins with a joined piece
    ]
  )
  return tokenizer
