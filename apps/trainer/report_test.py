import base64
from html.parser import HTMLParser
import io
import json
import math
import re

import numpy as np
from PIL import Image
import pytest

from apps.trainer import report
from apps.trainer.report import (
  ClassTable,
  ReportData,
  Sample,
  Stage,
  data_url,
  recreate_report,
  write_report,
)
from apps.trainer.report_text import mark_words, plain
from apps.trainer.sinks import MetricWriter
from ov_eval import Result

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"' {{ 7 * 7 }}"


class _Page(HTMLParser):
  """Parser that checks that tags are closed, and collects tags, attributes and text."""

  VOID = {"meta", "img", "line", "path", "circle"}

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


def _image(seed=0, side=64):
  return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _data(**changes):
  return ReportData(
    **{
      "title": "demo",
      "results": (
        Result("attribute_accuracy", 0.934, 512, 0.92, 0.95, "share"),
        Result("attribute_accuracy/colour", 0.97, 512, 0.96, 0.98, "share"),
        Result("caption_nll", 0.1523, 512, 0.147, 0.158, "nats"),
        Result("caption_perplexity", math.inf, 512, math.inf, math.inf),
      ),
      "summary": {"Parameters": 3_412_345, "Wall time": "6 min 12 s"},
      "stages": (Stage("32 px", 0), Stage("64 px", 60)),
      "samples": (
        Sample(_image(), "a red square", ("a blue square",), 1, 2),
        Sample(_image(1, 300), EVIL, (EVIL, "second reference")),
      ),
      "attribute_words": ("red", "blue", "square"),
      "classes": ClassTable(("cat", "dog"), np.array([[8, 2], [1, 9]])),
      "data": {"Training": {"records": 50_000}},
      "skipped": {"image does not decode": np.int64(12_345)},
      "config": {"model": {"width": 128}, "note": EVIL},
      "versions": report.versions(),
      **changes,
    }
  )


@pytest.fixture
def workdir(tmp_path):
  with MetricWriter(tmp_path) as writer:
    for step in range(1, 121):
      writer.write(step, {"train/loss": 3 / step, "train/odd_name": step})
      if step % 40 == 0:
        writer.write(step, {"eval/caption_nll": 2 / step, "eval/attribute_accuracy": step / 130})
  return tmp_path


def test_page_shows_all_data(workdir):
  source = write_report(workdir, _data()).read_text()
  page = _Page(source)
  for text in (
    "93.4%", "92.0 – 95.0%", "0.1523", "3,412,345", "6 min 12 s", "Training loss", "64 px",
    "image does not decode", "12,345", "50,000", "model.width", "128", "jax", "1/2",
    "train/odd_name", "second reference", "Attribute accuracy", "cat",
  ):  # fmt: skip
    assert text in page.text, text
  marked = re.findall(r'<span class="(right|wrong|missed)">([^<]*)', source)
  assert marked[3:] == [("wrong", "red"), ("right", "square"), ("missed", "blue")] * 2  # + mistakes


def test_captions_and_config_cannot_inject_markup(workdir):
  evil_everywhere = _data(
    title=EVIL,
    summary={EVIL: EVIL},
    samples_note=EVIL,
    stages=(Stage(EVIL, 0), Stage(EVIL, 9)),
    classes=ClassTable((EVIL, EVIL + "2"), np.eye(2, dtype=int)),
    data={EVIL: {EVIL: EVIL}},
    skipped={EVIL: 1},
    versions={EVIL: EVIL},
    results=(Result(EVIL, 1.0, 1, unit=EVIL), Result("attribute_accuracy/" + EVIL, 1.0, 1, 1, 1)),
    headline=(EVIL,),
    samples=(Sample(_image(), EVIL, (EVIL,), 0, 2), Sample(_image(), EVIL, (EVIL,))),
  )
  text = write_report(workdir, evil_everywhere).read_text()
  page = _Page(text)
  assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "link", "a")]
  assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
  assert all(a["src"].startswith("data:image/") for tag, a in page.tags if tag == "img")
  assert "<script>alert(1)</script>" in page.text  # shown as text
  assert "{{ 7 * 7 }}" in page.text


def test_nothing_is_loaded_from_elsewhere(workdir):
  text = write_report(workdir, _data()).read_text()
  page = _Page(text)
  assert not re.search(r"https?://|@import|url\(", text)
  policies = [a["content"] for tag, a in page.tags if "http-equiv" in a]
  assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_page_can_be_recreated_from_workdir(workdir):
  first = write_report(workdir, _data()).read_bytes()
  (workdir / "report.html").unlink()
  assert recreate_report(workdir).read_bytes() == first
  json.loads((workdir / "report.json").read_text(), parse_constant=lambda name: 1 / 0)
  files = sorted(path.name for path in workdir.iterdir())
  assert files == ["metrics.jsonl", "report.html", "report.json"]


def test_empty_run_gives_a_page(tmp_path):
  page = _Page(write_report(tmp_path, ReportData(title="nothing yet")).read_text())
  assert "nothing yet" in page.text and "Curves" not in page.text


def test_many_classes_show_the_weakest_instead_of_a_matrix(workdir):
  counts = np.diag(np.arange(1, 101)) + np.eye(100, k=1, dtype=int)
  table = ClassTable(tuple(f"class {i}" for i in range(100)), counts)
  page = _Page(write_report(workdir, _data(classes=table)).read_text())
  assert "Weakest classes" in page.text and "class 0" in page.text
  assert not [a for _, a in page.tags if a.get("class") == "matrix"]


def test_marks_follow_the_words():
  generated, truth = mark_words(
    "a large red circle, left of a dog",
    "a small red circle above a dog",
    ("large", "small", "red", "circle", "left of", "above"),
  )
  assert generated == [
    ("a", ""), ("large", "wrong"), ("red", "right"), ("circle,", "right"), ("left", "wrong"),
    ("of", "wrong"), ("a", ""), ("dog", ""),
  ]  # fmt: skip
  assert [word for word, mark in truth if mark] == ["small", "above"]
  everything, _ = mark_words("one two", "one three")
  assert everything == [("one", "right"), ("two", "wrong")]


@pytest.mark.parametrize(
  "value, text",
  [
    (1234567, "1,234,567"), (np.int64(1000), "1,000"), (3120.4, "3,120"), (0.5, "0.5"),
    (True, "True"), ("6 min", "6 min"), (math.nan, "–"),
  ],
)  # fmt: skip
def test_plain(value, text):
  assert plain(value) == text


def test_correct_paraphrase_is_marked_right(workdir):
  sample = Sample(_image(), "a star below a heart", ("a heart above a star",), 3, 3)
  data = _data(samples=(sample,), attribute_words=("star", "heart", "above", "below"))
  text = write_report(workdir, data).read_text()
  assert '<span class="right">star below</span>' in text
  assert text.count('class="wrong"') == text.count('class="missed"') == 1  # the legend only


def test_small_images_are_exact_and_large_ones_resized():
  small, large = _image(), _image(2, 600)
  kind, payload = data_url(small).split(",")
  assert kind == "data:image/png;base64"
  decoded = Image.open(io.BytesIO(base64.b64decode(payload)))
  np.testing.assert_array_equal(np.asarray(decoded), small)
  kind, payload = data_url(large).split(",")
  decoded = Image.open(io.BytesIO(base64.b64decode(payload)))
  assert kind == "data:image/jpeg;base64" and decoded.size == (224, 224)


def test_no_absolute_path_of_the_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  data = ReportData(
    title="run",
    results=(Result("caption_nll", 1.0, 10, context={"split": f"{tmp_path}/shards"}),),
    summary={"model": f"from {tmp_path}/home/best"},
    data={"Training": {"folder": f"{tmp_path}/run/data"}},
    config={"input": {"data_dir": f"{tmp_path}/run/data", "sources": ({"path": "gs://b/x"},)}},
  )
  (tmp_path / "run").mkdir()
  page = write_report(tmp_path / "run", data)
  for file in (page, page.with_name("report.json"), recreate_report(tmp_path / "run")):
    text = file.read_text()
    assert str(tmp_path) not in text
    assert "../home/best" in text and "gs://b/x" in text
  assert (
    json.loads(page.with_name("report.json").read_text())["config"]["input"]["data_dir"] == "data"
  )
