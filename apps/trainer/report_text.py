"""How the report writes things: words marked, numbers and names as people say them, pictures."""

import base64
from collections.abc import Mapping, Sequence
import difflib
import io
import itertools
import json
import math
import re
from typing import Any, Literal

import numpy as np
from PIL import Image

from apps.trainer import charts
from ov_eval import Result

Mark = Literal["right", "wrong", "missed", ""]


def mark_words(
  generated: str, reference: str, attribute_words: Sequence[str] = ()
) -> tuple[list[tuple[str, Mark]], list[tuple[str, Mark]]]:
  """Aligns two captions word by word.

  Returns:
    The words of `generated`, each "right" or "wrong", and those of `reference`, each "" or
    "missed". Words that say no attribute are "".
  """
  ours, truth = generated.split(), reference.split()
  checked = {word for text in attribute_words for word in text.lower().split()}

  def marks(words: list[str]) -> list[bool]:
    return [not checked or _bare(word) in checked for word in words]

  matcher = difflib.SequenceMatcher(
    a=[_bare(w) for w in ours], b=[_bare(w) for w in truth], autojunk=False
  )
  same_ours: set[int] = set()
  same_truth: set[int] = set()
  for block in matcher.get_matching_blocks():
    same_ours.update(range(block.a, block.a + block.size))
    same_truth.update(range(block.b, block.b + block.size))
  left: list[tuple[str, Mark]] = [
    (word, ("right" if i in same_ours else "wrong") if is_checked else "")
    for i, (word, is_checked) in enumerate(zip(ours, marks(ours)))
  ]
  right: list[tuple[str, Mark]] = [
    (word, "missed" if is_checked and i not in same_truth else "")
    for i, (word, is_checked) in enumerate(zip(truth, marks(truth)))
  ]
  return left, right


def runs(words: Sequence[tuple[str, Mark]]) -> list[tuple[str, Mark]]:
  """Neighbouring words of one mark joined."""
  grouped = itertools.groupby(words, key=lambda pair: pair[1])
  return [(" ".join(word for word, _ in group), mark) for mark, group in grouped]


def figure(result: Result) -> str:
  """The value as a person writes it."""
  if not math.isfinite(result.value):
    return "–"
  return f"{result.value:.1%}" if result.unit == "share" else charts.short(result.value)


def interval(result: Result) -> str:
  """The confidence interval, or nothing where there is none."""
  if result.low is None or result.high is None or not math.isfinite(result.low + result.high):
    return ""
  if result.unit == "share":
    return f"{100 * result.low:.1f} – {result.high:.1%}"
  return f"{charts.short(result.low)} – {charts.short(result.high)}"


def plain(value: Any) -> str:
  """A fact of the summary: numbers with thousands separators."""
  if isinstance(value, bool | np.bool_):
    return str(value)
  if isinstance(value, int | np.integer):
    return f"{value:,}"
  if isinstance(value, float | np.floating):
    number = float(value)
    return f"{number:,.0f}" if 1000 <= abs(number) < math.inf else charts.short(number)
  return str(value)


_SPELLING = (
  ("nll", "NLL"), ("zero shot", "zero-shot"), ("top1", "top-1"), ("top5", "top-5"), ("knn", "kNN"),
  ("img2txt", "picture to text"), ("txt2img", "text to picture"), ("r1", "R@1"), ("r5", "R@5"),
  ("r10", "R@10"), ("bleu4", "BLEU-4"), ("cider", "CIDEr"),
)  # fmt: skip


def label(name: str) -> str:
  """`attribute_accuracy/colour` -> `Attribute accuracy, colour`."""
  text = name.replace("_", " ").replace("/", ", ")
  for short, long in _SPELLING:
    text = re.sub(rf"\b{short}\b", long, text)
  return text[:1].upper() + text[1:] if text[:2].islower() else text  # kNN and NLL as they are


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
  """(dotted path, value as JSON) of every leaf."""
  rows = []
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      rows += flat(value, f"{prefix}{key}.")
    else:
      rows.append((f"{prefix}{key}", json.dumps(value, default=str)))
  return rows


def data_url(image: np.ndarray, longest: int = 224) -> str:
  """A picture as a data URL: PNG where small, else JPEG shrunk to `longest` pixels."""
  picture = Image.fromarray(np.asarray(image)).convert("RGB")
  if max(picture.size) <= 96:
    return _encoded(picture, "PNG")
  picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
  return _encoded(picture, "JPEG")


def thumbnail_url(image: np.ndarray, longest: int = 96) -> str:
  """A small picture as a data URL, PNG or JPEG, whichever is shorter."""
  picture = Image.fromarray(np.asarray(image)).convert("RGB")
  picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
  return min(_encoded(picture, "PNG"), _encoded(picture, "JPEG"), key=len)


def _encoded(picture: Image.Image, kind: str) -> str:
  buffer = io.BytesIO()
  picture.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
  return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _bare(word: str) -> str:
  return re.sub(r"\W+", "", word.lower())
