"""BERT text preparation and WordPiece as used by the published models."""

from collections.abc import Callable
import json
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ov_data import reversible_pieces, word_pieces

MAX_WORD_CHARS = 100  # a longer word is [UNK]
# `normalizer` restricted to ASCII.
NORMAL_ASCII = str.maketrans(
  {i: chr(i).lower() if chr(i).isprintable() else " " for i in range(128)}
)


def normalizer() -> normalizers.Normalizer:
  """Return the normalizer of TensorFlow Text's BertTokenizer(lower_case=True).

  It applies NFKC_Casefold and NFD, removes marks (Mn), and maps control and format characters to
  spaces. Over the 26,391 assigned characters outside the large CJK, Hangul and historic blocks, ids
  differ from TensorFlow Text for about 100 characters that captions do not contain (recent
  punctuation, historic letters). Hugging Face's BERT normalizer differs for 3,964. Words are
  limited to 100 characters here and to 100 bytes in TensorFlow Text, so longer unbroken runs of
  non-Latin script are [UNK] there.
  """
  return normalizers.Sequence(
    [
      normalizers.NFKD(),
      normalizers.Replace("\u0345", "\u03b9"),  # iota subscript; case folding makes it a letter
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


class AsciiFastPath(NamedTuple):
  """Faster encoding of ASCII texts with identical ids.

  Attributes:
    backend: tokenizer without its normalizer.
    prepare: function that normalizes an ASCII text.
  """

  backend: tokenizers.Tokenizer
  prepare: Callable[[str], str]


def ascii_fast_path(tokenizer: tokenizers.Tokenizer) -> AsciiFastPath | None:
  """Return a tokenizer without normalizer, which takes half the time.

  Returns None if the ids could differ because of another normalizer or added tokens.
  """
  if not isinstance(tokenizer.model, models.WordPiece):
    return None  # without serializing a vocabulary that may be large
  content = json.loads(tokenizer.to_str())
  if content["added_tokens"]:
    return None
  for own, prepare in (
    (normalizer(), _lower_ascii),
    *((reversible_pieces.normalizer(strip_accents=strip, letters=letters), _join_ascii)
      for strip in (False, True) for letters in (False, True)),
  ):  # fmt: skip
    if content["normalizer"] == _as_json(own):
      copy = tokenizers.Tokenizer.from_str(json.dumps({**content, "normalizer": None}))
      copy.encode_special_tokens = True
      return AsciiFastPath(copy, prepare)
  return None


def _as_json(normalizer: normalizers.Normalizer) -> Any:
  tokenizer = tokenizers.Tokenizer(models.WordPiece())
  tokenizer.normalizer = normalizer
  return json.loads(tokenizer.to_str())["normalizer"]


def _lower_ascii(text: str) -> str:
  return text.translate(NORMAL_ASCII)


def _join_ascii(text: str) -> str:
  return reversible_pieces.join_ascii(text.translate(NORMAL_ASCII))


def backend(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
  """Return a WordPiece tokenizer over a vocabulary with BERT's text preparation."""
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
