"""Tests of the page: valid HTML, escaping, no external resources, and correct charts."""

from html.parser import HTMLParser
import math
import re

import pytest

from ov_eval import Result
from tools.compare import page
from tools.compare.evaluations import Evaluation, columns

EVIL = "<script>alert(1)</script> & \"' {{ 7 * 7 }}"


class _Page(HTMLParser):
  """Parser that checks that tags are closed, and collects their attributes and text."""

  VOID = {"meta", "line", "path", "circle", "wbr"}

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self._open = [], "", []
    self.feed(text)
    assert not self._open, self._open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self._open.pop() == tag, (tag, self.getpos())

  def handle_data(self, data):
    self.text += data

  def having(self, tag, word):
    return [a for t, a in self.tags if t == tag and word in a.get("class", "").split()]


def _top1(value, **context):
  return Result("zero_shot_top1", value, 50, value - 0.1, value + 0.1, "share", context)


def _evaluation(run, step, *results):
  return Evaluation(run, step, 100 * step, 0.95, results)


def _render(everything, rows=None):
  rows = rows or everything
  return page.render(rows, columns(rows), everything, columns(everything))


def _runs(count):
  return [
    _evaluation(f"run_{i}", s, _top1(0.1 * s + 0.01 * i)) for i in range(count) for s in (1, 2)
  ]


def test_table_curves_and_bars():
  everything = _runs(2)
  text = _render(everything, everything[1::2])
  found = _Page(text)
  assert "run_0 and run_1" in found.text and "Zero-shot top-1" in found.text
  assert "10.0 – 30.0%" in found.text and len(found.having("span", "best")) == 2  # table, bar
  assert len(found.having("circle", "dot")) == 4 and len(found.having("g", "line")) == 2
  assert "run_1, samples seen 200: 21.0%" in found.text
  # Values of 20% and 21%, with an interval up to 31%, on an axis up to 40%.
  widths = [a["style"] for t, a in found.tags if t == "i"]
  assert widths == ["width:50.0%", "width:52.5%"]
  brackets = [a["style"] for t, a in found.tags if t == "b"]
  assert brackets[0] == "left:25.0%;width:50.0%"


def test_every_interval_is_inside_its_bar():
  results = [
    Result("cider", 0.3, 9, -0.2, 0.9),
    Result("cider", math.inf, 9),
    Result("cider", 0, 9),
  ]
  found = _Page(_render([_evaluation(f"run {i}", 1, r) for i, r in enumerate(results)]))
  (bracket,) = [a["style"] for t, a in found.tags if t == "b"]
  left, width = map(float, re.findall(r"[\d.]+(?=%)", bracket))
  assert left == 0 and left + width <= 100


def test_one_evaluation_of_each_has_no_curve_and_one_run_no_bars():
  found = _Page(_render([_evaluation("a", 1, _top1(0.1)), _evaluation("b", 1, _top1(0.2))]))
  assert not found.having("figure", "chart") and found.having("figure", "bars")
  found = _Page(_render(_runs(1)))
  assert found.having("figure", "chart") and not found.having("figure", "bars")


def test_incomparable_metrics_are_marked_everywhere():
  one = [_evaluation("a", s, _top1(0.1 * s, split="pets")) for s in (1, 2)]
  other = [_evaluation("b", s, _top1(0.2 * s, split="cars")) for s in (1, 2)]
  found = _Page(_render([*one, *other], [one[1], other[1]]))
  assert found.text.count("split of Zero-shot top-1: pets (a) against cars (b)") == 1
  assert len(found.having("span", "warn")) == 3  # heading, curve, bars
  assert not found.having("span", "best")


def test_a_change_within_a_run_is_reported_with_its_curves():
  stages = [_evaluation("a", s, _top1(0.1 * s, preprocessing=f"{s}4 px")) for s in (8, 22)]
  whole = [*stages, _evaluation("b", 22, _top1(0.5, preprocessing="224 px"))]
  found = _Page(_render(whole, whole[1:]))
  assert "preprocessing of Zero-shot top-1: 84 px (a) against 224 px (a, b)" in found.text


def test_many_runs_keep_their_colors():
  everything = _runs(10)
  found = _Page(_render(everything, everything[1::2]))
  lines = [a["class"] for a in found.having("g", "line")]
  assert lines[0] == "line c0" and lines[8] == "line c0 again" and len(set(lines)) == 10
  bars = [a["class"] for a in found.having("span", "bar")]
  assert [c.split()[1:] for c in bars] == [c.split()[1:] for c in lines]


@pytest.mark.parametrize("count, folded", [(6, 0), (9, 2)])
def test_more_than_six_charts_are_collapsed(count, folded):
  results = [Result(f"figure {i}", 0.5, 9) for i in range(count)]
  evaluations = [_evaluation(run, s, *results) for run in "ab" for s in (1, 2)]
  found = _Page(_render(evaluations, evaluations[1::2]))
  assert sum(tag == "details" for tag, _ in found.tags) == folded
  assert len(found.having("figure", "chart")) == len(found.having("figure", "bars")) == count


def test_nothing_is_loaded_and_everything_is_escaped():
  evil = [
    _evaluation(EVIL, s, Result(EVIL, 0.5, 9, context={"split": EVIL + str(s)})) for s in (1, 2)
  ]
  text = _render([*evil, _evaluation("b", 1, Result(EVIL, 0.1, 9))])
  found = _Page(text)
  assert not any(tag in ("script", "img", "link", "iframe") for tag, _ in found.tags)
  assert "{{ 7 * 7 }}" in found.text and "49" not in found.text
  assert not re.search(r"https?://", text) and "url(" not in text
  assert any(a.get("content", "").startswith("default-src 'none'") for _, a in found.tags)
