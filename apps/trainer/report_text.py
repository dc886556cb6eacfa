"""Text of the report: marked captions, formatted metrics and names, image data URLs."""

import base64
from collections.abc import Mapping, Sequence
import difflib
import functools
import io
import itertools
import json
import math
from pathlib import Path
import re
from typing import Any, Literal

import jinja2
import numpy as np
from PIL import Image

from apps.trainer import charts
from apps.trainer.names import leaf_values
from ov_eval import Result

Mark = Literal["right", "wrong", "missed", ""]


def mark_words(
  generated: str, reference: str, attribute_words: Sequence[str] = ()
) -> tuple[list[tuple[str, Mark]], list[tuple[str, Mark]]]:
  """Align two captions word by word.

  Returns:
    The words of `generated`, each marked "right" or "wrong", and those of `reference`, each marked
    "" or "missed". Words that are not attributes are marked "".
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
  """Merge adjacent words with the same mark."""
  grouped = itertools.groupby(words, key=lambda pair: pair[1])
  return [(" ".join(word for word, _ in group), mark) for mark, group in grouped]


def figure(result: Result) -> str:
  """Format the value of a result."""
  if not math.isfinite(result.value):
    return "–"
  return f"{result.value:.1%}" if result.unit == "share" else charts.short(result.value)


def interval(result: Result) -> str:
  """Format the confidence interval; empty without one."""
  if result.low is None or result.high is None or not math.isfinite(result.low + result.high):
    return ""
  if result.unit == "share":
    return f"{100 * result.low:.1f} – {result.high:.1%}"
  return f"{charts.short(result.low)} – {charts.short(result.high)}"


def plain(value: Any) -> str:
  """Format a fact of the summary: numbers get thousands separators."""
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
  ("img2txt", "image to text"), ("txt2img", "text to image"), ("r1", "R@1"), ("r5", "R@5"),
  ("r10", "R@10"), ("bleu4", "BLEU-4"), ("cider", "CIDEr"),
)  # fmt: skip


def label(name: str) -> str:
  """Format a metric name: `attribute_accuracy/colour` -> `Attribute accuracy, colour`."""
  text = name.replace("_", " ").replace("/", ", ")
  for short, long in _SPELLING:
    text = re.sub(rf"\b{short}\b", long, text)
  return text[:1].upper() + text[1:] if text[:2].islower() else text  # keeps kNN and NLL


@functools.cache
def template(path: Path) -> jinja2.Template:
  """Return the template of a page; its filters format metrics, intervals, names and facts."""
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  parts = lambda name: re.findall(r"[^_/]+[_/]*|[_/]+", name)  # a long name may break after each
  environment.filters.update(
    figure=figure, interval=interval, label=label, parts=parts, plain=plain
  )
  return environment.from_string(path.read_text(encoding="utf-8"))


def flat(config: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return (dotted path, value as JSON) of every leaf."""
  return [(name, json.dumps(value, default=str)) for name, value in leaf_values(config)]


def data_url(image: np.ndarray) -> str:
  """Encode an image as a data URL: PNG up to 96 px, else JPEG of at most 224 px."""
  rgb = Image.fromarray(np.asarray(image)).convert("RGB")
  if max(rgb.size) <= 96:
    return _encoded(rgb, "PNG")
  rgb.thumbnail((224, 224), Image.Resampling.LANCZOS)
  return _encoded(rgb, "JPEG")


def thumbnail_url(image: np.ndarray) -> str:
  """Encode an image of at most 96 px as a data URL, PNG or JPEG, whichever is shorter."""
  rgb = Image.fromarray(np.asarray(image)).convert("RGB")
  rgb.thumbnail((96, 96), Image.Resampling.LANCZOS)
  return min(_encoded(rgb, "PNG"), _encoded(rgb, "JPEG"), key=len)


def _encoded(rgb: Image.Image, kind: str) -> str:
  buffer = io.BytesIO()
  rgb.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
  return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _bare(word: str) -> str:
  return re.sub(r"\W+", "", word.lower())
