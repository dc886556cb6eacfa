"""Tests of the suites, and of the lists of clip-benchmark."""

import json
import sys

import pytest

from ov_eval.suites import (
  SUITES,
  BenchmarkSet,
  benchmark_classes,
  benchmark_prompts,
  benchmark_templates,
)


def _set(suite, name):
  return next(data_set for data_set in SUITES[suite] if data_set.name == name)


def test_sizes():
  assert {name: len(sets) for name, sets in SUITES.items()} == {
    "clip_benchmark": 47,
    "datacomp38": 38,
    "vtab": 19,
  }
  for sets in SUITES.values():
    assert len({data_set.name for data_set in sets}) == len(sets)


def test_lists_of_the_installed_wheel(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
  names = benchmark_classes(_set("clip_benchmark", "imagenet1k"))
  assert len(names) == 1000 and names[0] == "tench"
  assert benchmark_classes(_set("vtab", "vtab/dtd")) is None
  # TFDS numbers the classes of caltech101 in another order than torchvision.
  vtab = benchmark_classes(_set("vtab", "vtab/caltech101"))
  assert len(vtab) == 102 and vtab != benchmark_classes(BenchmarkSet("caltech101"))
  assert benchmark_templates(_set("vtab", "vtab/pets")) == ("a photo of a {c}, a type of pet.",)
  default = benchmark_templates(_set("datacomp38", "wilds/fmow"))
  assert default == benchmark_templates(_set("datacomp38", "imagenet1k")) and len(default) == 80
  for sets in SUITES.values():
    for data_set in sets:
      assert all("{c}" in template for template in benchmark_templates(data_set))


def test_prompts():
  texts = benchmark_prompts(("cat", "C++ {}"), ("a {c}.", "{c}, {c}"))
  assert texts == ["a cat.", "cat, cat", "a C++ {}.", "C++ {}, C++ {}"]


def test_errors(monkeypatch, tmp_path):
  name = "clip_benchmark"
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  with pytest.raises(ValueError, match="pip install --no-deps clip-benchmark"):
    benchmark_templates(_set("vtab", "vtab/pets"))
  monkeypatch.delitem(sys.modules, name)
  folder = tmp_path / name / "datasets"
  folder.mkdir(parents=True)
  (tmp_path / name / "__init__.py").write_text("raise ImportError('not imported')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match="no readable en_classnames.json"):
    benchmark_classes(_set("vtab", "vtab/pets"))
  (folder / "en_classnames.json").write_text(json.dumps({"pets": "cat"}))
  with pytest.raises(ValueError, match="expected an object of lists"):
    benchmark_classes(_set("vtab", "vtab/pets"))
