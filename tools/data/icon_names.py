"""Cleaning of icon names: removal of the style, the size and the number of a variant."""

from collections import Counter
from collections.abc import Collection, Iterable
import re
from typing import NamedTuple

# Words that describe a drawing style. A set uses one as a style if it declares it, or if at least
# this fraction of its names ends with it, so "traffic-light" and "chart-line" keep their last word.
_STYLES = frozenset(
  [
    "outline",
    "outlined",
    "fill",
    "filled",
    "solid",
    "line",
    "linear",
    "stroke",
    "bold",
    "thin",
    "light",
    "regular",
    "duotone",
    "duo",
    "twotone",
    "tone",
    "two-tone",
    "sharp",
    "round",
    "rounded",
    "broken",
    "bulk",
    "color",
    "dark",
    "mini",
    "micro",
    "alt",
    "o",
    "f",
    "r",
    "small",
    "large",
    "sm",
    "md",
    "lg",
    "xl",
    "wordmark",
    "mirrored",
    "ltr",
    "rtl",
    "background",
    "stipple",
  ]
)
_STYLE_FRACTION = 0.04
_SIZES = frozenset(
  [
    "8",
    "10",
    "12",
    "14",
    "15",
    "16",
    "18",
    "20",
    "22",
    "24",
    "28",
    "32",
    "36",
    "40",
    "48",
    "64",
    "96",
  ]
)
_SIZE_FRACTION = 0.2
_NUMBER = re.compile(r"0?[1-9]|one|two|three|four|five")
_TONES = frozenset(("light", "medium", "dark"))  # skin tones
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_WORD = re.compile(r"[a-z]{2}")
_MAX_CHARS = 100


class CleanName(NamedTuple):
  """A name without style and variant.

  Attributes:
    text: words separated by spaces; empty if the name has no word.
    style: removed style words, separated by spaces.
  """

  text: str
  style: str


class SetNames:
  """Cleans the names of one set, whose conventions are derived from all of its names.

  Args:
    names: all names of the set.
    prefixes, suffixes: words that the set declares as styles or sizes, such as "24-filled".
  """

  def __init__(
    self, names: Collection[str], prefixes: Iterable[str] = (), suffixes: Iterable[str] = ()
  ):
    self._names = frozenset(names)
    self._prefixes = {word for prefix in prefixes for word in prefix.split("-")} - {""}
    declared = {word for suffix in suffixes for word in suffix.split("-")} - {""}
    ends = Counter(_last_word(name) for name in names if "-" in name)
    least = max(2, _STYLE_FRACTION * len(names))
    self._has_tones = all(ends[tone] >= least for tone in _TONES)
    self._styles = {word for word in declared if not _is_size(word)}
    self._styles |= {word for word in _STYLES if ends[word] >= least}
    self._styles |= {*_TONES, "default"} if self._has_tones else set()
    bases = [self._without_styles(name.split("-")) for name in names]
    sized = sum(len(words) > 1 and _is_size(words[-1]) for words in bases)
    self._has_sizes = any(map(_is_size, declared)) or sized >= max(2, _SIZE_FRACTION * len(names))

  def clean(self, name: str) -> CleanName:
    """Return the words of a name, without the style, size or number of a variant."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_CHARS:
      return CleanName("", "")
    words, style = name.split("-"), list[str]()
    while len(words) > 1 and words[0] in self._prefixes:
      style.append(words.pop(0))
    while len(words) > 1:
      last = words[-1]
      if last == "tone" and words[-2] == "skin":
        words = words[:-2]
        while len(words) > 1 and words[-1] in _TONES:
          words.pop()
      elif last in self._styles:
        words.pop()
        if not (self._has_tones and last in {*_TONES, "default"}):
          style.insert(0, last)
      elif self._is_variant(words):
        words.pop()
      else:
        break
    text = " ".join(words)
    return CleanName(text if _WORD.search(text) else "", " ".join(style))

  def _without_styles(self, words: list[str]) -> list[str]:
    while len(words) > 1 and words[-1] in self._styles:
      words = words[:-1]
    return words

  def _is_variant(self, words: list[str]) -> bool:
    """Return whether the last word is a size, or the number of a variant of another icon."""
    last = words[-1]
    if (self._has_sizes and _is_size(last)) or re.fullmatch(r"0[1-9]|\d+px", last):
      return True
    return bool(_NUMBER.fullmatch(last)) and "-".join(words[:-1]) in self._names


def _last_word(name: str) -> str:
  """Return the last word that is not a size."""
  words = name.split("-")
  return next((word for word in reversed(words) if not _is_size(word)), words[-1])


def _is_size(word: str) -> bool:
  return word.removesuffix("px") in _SIZES
