"""Split names and slices: "train", "train[:90%]", "train[-1000:]", "[1000:][:50%]"."""

import dataclasses
import re

_SPLIT = re.compile(r"([^\[\]]*)((?:\[[^\[\]]*\])*)")
_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")


@dataclasses.dataclass(frozen=True)
class Split:
  """A split and slices of it.

  Attributes:
    name: name of the split; None for everything.
    slices: nested (start, stop) ranges; each indexes into the result of the previous one.
  """

  name: str | None
  slices: tuple[tuple[str, str], ...] = ()

  @classmethod
  def parse(cls, text: str | None) -> "Split":
    """Parse a split; raise ValueError if the text has none of the forms above."""
    match = _SPLIT.fullmatch(text or "")
    slices = _SLICE.findall(match[2]) if match else []
    if not match or len(slices) != match[2].count("["):
      raise ValueError(
        f"split={text!r}: expected a name, or a slice such as 'train[:90%]', 'train[1000:2000]', "
        "'train[-500:]', '[90%:]'"
      )
    return cls(match[1] or None, tuple(slices))

  def range(self, total: int) -> range:
    """Return the record range that the slices select from `total` records."""
    kept = range(total)
    for start, stop in self.slices:
      kept = kept[_border(start or "0", len(kept)) : _border(stop or "100%", len(kept))]
    return kept


def _border(text: str, total: int) -> int:
  """Return the index in [0, total] of a number or percentage; negatives count from the end."""
  number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
  return min(total, max(0, number + total if number < 0 else number))
