"""Parts of data sets by name: "train", "train[:90%]", "train[-1000:]", "[1000:][:50%]"."""

import dataclasses
import re

_SPLIT = re.compile(r"([^\[\]]*)((?:\[[^\[\]]*\])*)")
_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")


@dataclasses.dataclass(frozen=True)
class Split:
  """name: of the split, None for everything. slices: (start, stop), one applied to the other."""

  name: str | None
  slices: tuple[tuple[str, str], ...] = ()

  @classmethod
  def parse(cls, text: str | None) -> "Split":
    """Raises ValueError where the text is none of the forms above."""
    match = _SPLIT.fullmatch(text or "")
    slices = _SLICE.findall(match[2]) if match else []
    if not match or len(slices) != match[2].count("["):
      raise ValueError(
        f"split={text!r}: expected a name, or a part such as 'train[:90%]', 'train[1000:2000]', "
        "'train[-500:]', '[90%:]'"
      )
    return cls(match[1] or None, tuple(slices))

  def range(self, total: int) -> range:
    """The records that the slices leave of the `total` ones of the named split."""
    kept = range(total)
    for start, stop in self.slices:
      kept = kept[_border(start or "0", len(kept)) : _border(stop or "100%", len(kept))]
    return kept


def _border(text: str, total: int) -> int:
  """A number or a percentage as a place in 0 to total; negative ones count from the end."""
  number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
  return min(total, max(0, number + total if number < 0 else number))
