"""Tests that pip lines of model cards are complete, with the bounds of docs and tests."""

import ast
from pathlib import Path
import re
import shlex
import sys
import tomllib

import pytest

from apps.exporter import card, libraries, snippets
from apps.exporter.card import CardFacts
from apps.exporter.formats.table import EXPORTS
from ov_convert.release import Preprocess, Release, TokenizerSpec
import ov_models

ROOT = Path(__file__).parents[2]
_SIZES = {"image_size": 32, "vocab_size": 100}
VIT = ov_models.ViTConfig.from_name("mu/16", image_size=32)
WORDS = TokenizerSpec("{}", 16, True, 0, 1, 2, 3, 4)
MODELS = {
  "pair": (
    ov_models.VisionLanguageConfig.from_names("mu/16", "Ti", None, text_len=16, **_SIZES),
    WORDS,
  ),
  "captioner": (
    ov_models.VisionLanguageConfig.openvision2("mu/16", "Ti", max_len=12, **_SIZES),
    WORDS,
  ),
  "image": (VIT, None),
}
CASES = [(kind, name) for kind in EXPORTS for name in MODELS]
# Pip packages by import name, if they differ. Declared dependencies of these need not be in the
# line.
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open_clip_torch", "openvision_torch": None}
BROUGHT = {
  "open_clip_torch": {"pillow", "numpy"},
  "timm": {"pillow", "numpy"},
  "packages/ov-models": {"jax", "numpy", "ov_models"},
  "packages/ov-data": {"ov_data"},
}
# Undeclared dependencies of libraries.
UNDECLARED = {
  "open_clip.get_tokenizer": "transformers",
  "export.deserialize": "flatbuffers",
  "AutoImageProcessor": "torchvision",
}


def _programs(kind, name):
  config, words = MODELS[name]
  return snippets.snippets(kind, Release(config, {}, Preprocess(32, "center"), words, "float32"))


@pytest.mark.parametrize("kind, name", CASES)
def test_the_pip_line_installs_whatever_the_program_imports(kind, name):
  for program in _programs(kind, name):
    tree = ast.parse(program.code)
    modules = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    needed = {DISTRIBUTIONS.get(top, top) for top in {m.split(".")[0] for m in modules}}
    needed -= {None, *sys.stdlib_module_names}
    needed |= {what for call, what in UNDECLARED.items() if call in program.code}
    installed = set(program.install).union(*(BROUGHT.get(p, set()) for p in program.install))
    assert needed <= installed, (kind, name, program.title)


@pytest.mark.parametrize("kind, name", CASES)
def test_the_card_has_the_line_and_both_versions_of_every_library(kind, name):
  config, words = MODELS[name]
  release = Release(config, {}, Preprocess(32, "center"), words, "float32")
  page = card.render(CardFacts(kind, release, "mit"))
  for program in _programs(kind, name):
    assert f"\n`{program.pip_line}`\n" in page
    for library, versions in program.tested.items():
      assert f"{library} {versions.oldest}" in page and f"{library} {versions.newest}" in page


def test_lines_are_quoted_for_a_shell_and_hold_lower_bounds():
  line = libraries.pip_line(("open_clip_torch", "torch"))
  assert line == 'pip install "open_clip_torch>=3.0.0" "torch>=2.6.0"'
  assert shlex.split(line)[2:] == libraries.requirements(line, "newest")
  assert libraries.names(line) == ["open_clip_torch", "torch"]
  assert libraries.requirements(line, "oldest") == ["open_clip_torch==3.0.0", "torch==2.6.0"]
  own = libraries.requirements("pip install packages/ov-models", "oldest")
  assert own[0] == "packages/ov-models" and "jax==0.9.1" in own
  with pytest.raises(ValueError, match="'newest' or 'oldest'"):
    libraries.requirements(line, "old")


def test_models_without_text_need_no_tokenizer():
  assert "transformers" in _programs("open_clip", "pair")[0].install
  for name in ("captioner", "image"):
    assert "transformers" not in _programs("open_clip", name)[0].install
  assert "tokenizers" not in _programs("onnx", "captioner")[0].install
  assert "tokenizers" in _programs("stablehlo", "captioner")[0].install


def _number(version):
  return tuple(int(part) for part in version.split("."))


def test_oldest_is_not_newer_than_newest():
  tables = (libraries.TESTED, *libraries.OWN.values())
  for versions in (found for table in tables for found in table.values()):
    assert _number(versions.oldest) <= _number(versions.newest)


@pytest.mark.parametrize("name", libraries.OWN)
def test_bounds_of_our_packages_are_those_that_they_declare(name):
  declared = {}
  project = tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]
  for line in project["dependencies"]:
    package, bound = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
    declared[package] = bound
  tested = libraries.OWN[name]
  assert tested.keys() == declared.keys()
  for package, bound in declared.items():  # the first release may be later than the bound
    oldest = _number(tested[package].oldest)
    assert _number(bound) <= oldest and oldest[:1] == _number(bound)[:1], package


def test_the_table_of_the_docs_is_this_one():
  page = (ROOT / "packages/ov-convert/README.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
  assert rows == [(n, v.oldest, v.newest) for n, v in libraries.TESTED.items()]
