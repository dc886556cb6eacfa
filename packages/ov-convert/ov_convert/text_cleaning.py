"""Text cleaning of SigLIP and SigLIP 2 as normalizers of tokenizer.json.

Must equal ov_data.text_cleaning, which this package may not import; apps/exporter/importer_test.py
compares them.
"""

from collections.abc import Mapping
import re
import string
from typing import Any, Literal

# "lower": lower case, as Siglip2Tokenizer of transformers.
# "siglip": lower case without ASCII punctuation, and single spaces, as SiglipTokenizer.
# "canonicalize": the same for NFC without curly quotes and with "_" as a space, as open_clip with
# clean="canonicalize".
Clean = Literal["none", "lower", "siglip", "canonicalize"]

_FINAL_SIGMA = r"(?<=\p{L}|\p{L}[\p{M}.:'’·])Σ(?![\p{M}.:'’·]*\p{L})"


def add(content: Mapping[str, Any], clean: Clean) -> dict[str, Any]:
  """Return tokenizer.json with a cleaning in front of its normalizer, unless it begins with it."""
  new, own = _STEPS[clean], content.get("normalizer")
  old = (
    own.get("normalizers") if isinstance(own, Mapping) and own.get("type") == "Sequence" else own
  )
  old = old if isinstance(old, list) else [] if old is None else [old]
  if old[: len(new)] == new:
    return dict(content)
  return {**content, "normalizer": {"type": "Sequence", "normalizers": [*new, *old]}}


def _replace(old: str, new: str) -> dict[str, Any]:
  return {"type": "Replace", "pattern": {"Regex": old}, "content": new}


_LOWER: list[dict[str, Any]] = [{"type": "Lowercase"}]
_WORDS: list[dict[str, Any]] = [
  _replace(_FINAL_SIGMA, "ς"),
  *_LOWER,
  _replace(f"[{re.escape(string.punctuation)}]", ""),
  _replace(r"[\s\x1c-\x1f]+", " "),
  {"type": "Strip", "strip_left": True, "strip_right": True},
]
_STEPS: dict[Clean, list[dict[str, Any]]] = {
  "none": [],
  "lower": _LOWER,
  "siglip": _WORDS,
  "canonicalize": [
    {"type": "NFC"},
    _replace("[\u02bc\u2018-\u201f]", ""),
    {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
    *_WORDS,
  ],
}
