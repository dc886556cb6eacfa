"""WordPiece as the published models read texts, put together from the `tokenizers` library."""

from collections.abc import Callable
import json
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ov_data import own_pieces, word_pieces

MAX_WORD_CHARS = 100  # a longer word is [UNK]
# What `normalizer` makes of ASCII.
NORMAL_ASCII = str.maketrans(
  {i: chr(i).lower() if chr(i).isprintable() else " " for i in range(128)}
)


def normalizer() -> normalizers.Normalizer:
  """The text preparation of TensorFlow Text's BertTokenizer(lower_case=True).

  That is NFKC_Casefold, NFD, removal of marks (Mn), control and format characters to spaces.
  Compared over the 26,391 assigned characters outside the large CJK, Hangul and historic blocks,
  ids differ for about 100 that captions do not hold (later punctuation, historic letters); Hugging
  Face's own BERT normaliser differs for 3,964. Words are limited to 100 characters, there 100
  bytes: longer unbroken runs of non-Latin script are [UNK] there.
  """
  return normalizers.Sequence(
    [
      normalizers.NFKD(),
      normalizers.Replace("\u0345", "\u03b9"),  # iota subscript, a letter once case is folded
      normalizers.Replace(
        tokenizers.Regex(r"[\p{Default_Ignorable_Code_Point}\p{Mn}]"),
        "",
      ),
      normalizers.Replace(tokenizers.Regex("[ßẞ]"), "ss"),
      normalizers.Replace("ς", "σ"),
      normalizers.Replace(tokenizers.Regex(r"[\p{Cc}\p{Cf}]"), " "),
      normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=True
      ),
    ]
  )


class ShortCut(NamedTuple):
  """A faster way to the same ids for ASCII texts.

  Attributes:
    backend: the tokenizer without its normaliser.
    prepare: does to an ASCII text what the normaliser does.
  """

  backend: tokenizers.Tokenizer
  prepare: Callable[[str], str]


def ascii_short_cut(tokenizer: tokenizers.Tokenizer) -> ShortCut | None:
  """Return a copy without normaliser, which takes half of the time.

  None where that would not be the same, because the normaliser is another or tokens were added.
  """
  content = json.loads(tokenizer.to_str())
  if content["added_tokens"]:
    return None
  for own, prepare in (
    (normalizer(), _lower_ascii),
    *((own_pieces.normalizer(strip_accents=strip, letters=letters), _join_ascii)
      for strip in (False, True) for letters in (False, True)),
  ):  # fmt: skip
    if content["normalizer"] == _as_json(own):
      copy = tokenizers.Tokenizer.from_str(json.dumps({**content, "normalizer": None}))
      copy.encode_special_tokens = True
      return ShortCut(copy, prepare)
  return None


def _as_json(normalizer: normalizers.Normalizer) -> Any:
  tokenizer = tokenizers.Tokenizer(models.WordPiece())
  tokenizer.normalizer = normalizer
  return json.loads(tokenizer.to_str())["normalizer"]


def _lower_ascii(text: str) -> str:
  return text.translate(NORMAL_ASCII)


def _join_ascii(text: str) -> str:
  return own_pieces.join_ascii(text.translate(NORMAL_ASCII))


def backend(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
  """WordPiece over a vocabulary, texts and words prepared as BERT's are."""
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece(
      vocabulary,
      unk_token="[UNK]",
      max_input_chars_per_word=MAX_WORD_CHARS,
      continuing_subword_prefix=word_pieces.PREFIX,
    )
  )
  tokenizer.normalizer = normalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece(prefix=word_pieces.PREFIX, cleanup=True)
  return tokenizer
