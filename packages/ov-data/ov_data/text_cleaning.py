"""Text cleaning of SigLIP and SigLIP 2 as normalizers of the `tokenizers` library.

The cleaning becomes part of tokenizer.json, so every reader of the file applies it. The same
normalizers are written by ov_convert.text_cleaning, which may not import this package;
apps/exporter/importer_test.py compares them.
"""

import re
import string
from typing import Literal, get_args

import tokenizers
from tokenizers import normalizers

# "lower": lower case, as Siglip2Tokenizer of transformers.
# "siglip": lower case without ASCII punctuation, and single spaces, as SiglipTokenizer.
# "canonicalize": the same for NFC without curly quotes and with "_" as a space, as open_clip with
# clean="canonicalize". HTML entities, and what else ftfy repairs there, are not decoded.
Clean = Literal["none", "lower", "siglip", "canonicalize"]

# The library lower-cases single characters, Python a sigma at the end of a word to another letter.
FINAL_SIGMA = r"(?<=\p{L}|\p{L}[\p{M}.:'’·])Σ(?![\p{M}.:'’·]*\p{L})"
QUOTES = "[\u02bc\u2018-\u201f]"
PUNCTUATION = f"[{re.escape(string.punctuation)}]"
SPACES = r"[\s\x1c-\x1f]+"  # white space of Python


def steps(clean: Clean) -> list[normalizers.Normalizer]:
  """Return the normalizers of a cleaning, in order.

  `str.lower` and `str.translate` of Python give the same texts, except for letters that Unicode
  added after the version of Python, and for a capital sigma between unusual punctuation.

  Args:
    clean: cleaning.

  Raises:
    ValueError: if the cleaning is unknown.
  """
  if clean not in get_args(Clean):
    raise ValueError(f"clean={clean!r}: expected one of {', '.join(get_args(Clean))}")
  if clean == "none":
    return []
  if clean == "lower":
    return [normalizers.Lowercase()]
  first: list[normalizers.Normalizer] = []
  if clean == "canonicalize":
    quotes = normalizers.Replace(tokenizers.Regex(QUOTES), "")
    first = [normalizers.NFC(), quotes, normalizers.Replace("_", " ")]
  return [
    *first,
    normalizers.Replace(tokenizers.Regex(FINAL_SIGMA), "ς"),
    normalizers.Lowercase(),
    normalizers.Replace(tokenizers.Regex(PUNCTUATION), ""),
    normalizers.Replace(tokenizers.Regex(SPACES), " "),
    normalizers.Strip(),
  ]


def add(backend: tokenizers.Tokenizer, clean: Clean) -> None:
  """Put a cleaning in front of the normalizer of a tokenizer, unless it begins with it."""
  new = steps(clean)
  own = backend.normalizer
  if own is None:
    old = []
  elif isinstance(own, normalizers.Sequence):
    old = [own[i] for i in range(len(own))]
  else:
    old = [own]
  if [step.__getstate__() for step in old[: len(new)]] != [step.__getstate__() for step in new]:
    backend.normalizer = normalizers.Sequence([*new, *old])
