"""WordPiece for tokenizers trained on own captions: decoding gives back the text that was encoded.

The published models' text preparation (`bert`) removes accents and vowel signs, and forgets where
spaces were around punctuation. Here texts are normalised (NFC), in lower case and with single
spaces, and nothing else is lost: where a word was joined to the one before it, its piece begins
with a joiner. "don't" is `don`, `￭'`, `￭t`.
"""

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
  steps = [normalizers.NFC()]
  if strip_accents:
    steps = [normalizers.NFD(), normalizers.Replace(tokenizers.Regex(r"\p{Mn}"), ""), *steps]
  return normalizers.Sequence(
    [
      *steps,
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
