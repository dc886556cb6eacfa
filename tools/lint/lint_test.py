"""Tests of the checks, on small trees that violate one rule each."""

import textwrap

import pytest

from tools.lint import agreement, buildfiles, housekeeping, import_rules, language
from tools.lint.tree import Tree

# A tree without violations: a package with a library and a test, and an app.
GOOD = {
  "packages/ov-models/BUILD.bazel": """
    load("//tools/python:defs.bzl", "ov_py_library", "ov_py_test")
    ov_py_library(
        name = "ov-models",
        srcs = glob(["ov_models/**/*.py"], exclude = ["**/*_test.py"]),
        deps = ["@pypi//:numpy"],
    )
    ov_py_test(name = "vit_test", srcs = ["ov_models/vit_test.py"], deps = [":ov-models"])
    """,
  "packages/ov-models/pyproject.toml": """
    [project]
    name = "ov-models"
    dependencies = ["numpy>=2.0"]
    """,
  "packages/ov-models/README.md": "",
  "packages/ov-models/CHANGELOG.md": "",
  "packages/ov-models/ov_models/vit.py": "import math\nimport numpy as np\n",
  "packages/ov-models/ov_models/vit_test.py": "import pytest\nfrom ov_models import vit\n",
  "apps/BUILD.bazel": """
    ov_py_binary(name = "train", srcs = ["train.py"], deps = ["//packages/ov-models"])
    """,
  "apps/train.py": "import os\nfrom ov_models.vit import ViT\n",
  "tools/python/requirements.lock": "numpy==2.4.6 ; python_full_version < '3.12'\npytest==9.0\n",
}
CHECKS = [
  import_rules.check,
  agreement.check_deps,
  agreement.check_pyproject,
  housekeeping.check_files,
  housekeeping.check_words,
]


def make(root, **changes) -> Tree:
  for path, text in {**GOOD, **changes}.items():
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(textwrap.dedent(text).lstrip())
  return Tree(root)


def violations(tree: Tree) -> list[str]:
  return [str(violation) for check in CHECKS for violation in check(tree)]


def test_good_tree_has_no_violation(tmp_path):
  assert violations(make(tmp_path)) == []


VIT = "packages/ov-models/ov_models/vit.py"
VIT_TEST = "packages/ov-models/ov_models/vit_test.py"
PROJECT = "packages/ov-models/pyproject.toml"
LOADER = "packages/ov-data/ov_data/loader.py"
CLIENT = "packages/ov-convert/ov_convert/clients/run_timm.py"


@pytest.mark.parametrize(
  ("path", "text", "violation"),
  [
    (
      VIT,
      "import apps.train",
      f"{VIT}:1: imports apps.train, but of this repository ov_models may",
    ),
    (VIT, "def f():\n  import optax", f"{VIT}:2: imports optax, but ov_models may import only"),
    (VIT, "import chex", f"{VIT}:1: imports chex, but ov_models may import only einops, flax,"),
    (LOADER, "import jax.numpy as jnp", f"{LOADER}:1: imports jax.numpy, but ov_data may import"),
    (LOADER, "import tensorflow", f"{LOADER}:1: imports tensorflow, but ov_data may do so inside"),
    ("apps/trainer/loop.py", "from apps import train", "apps/trainer/loop.py:1: imports apps, but"),
    ("tools/a.py", "import apps.train", "tools/a.py:1: imports apps.train, but tools import"),
    (CLIENT, "import ov_models.vit", f"{CLIENT}:1: imports ov_models.vit, but scripts of the"),
    (CLIENT, "import requests", f"{CLIENT}:1: imports requests, but scripts of the clients'"),
    (
      "apps/b.py",
      "from tools import a",
      "apps/b.py:1: imports tools, but apps import packages and",
    ),
  ],
)
def test_import_rules(tmp_path, path, text, violation):
  tree = make(tmp_path, **{"tools/a.py": "", "apps/b.py": "", path: text})
  assert [str(found)[: len(violation)] for found in import_rules.check(tree)] == [violation]


@pytest.mark.parametrize(
  ("path", "text"),
  [
    (VIT_TEST, "import chex"),
    (LOADER, "def read():\n  import tensorflow"),
    (LOADER, "from google.protobuf import message"),
    ("apps/trainer/loop.py", "from apps.trainer import step"),
    ("tools/a.py", "from apps.trainer.step import Step"),
    ("tools/a.py", "from apps.demo import scenes"),
    ("tools/preflight/c.py", "from apps import b"),
    (CLIENT, "import json\nimport torch, timm\nimport run_timm"),
  ],
)
def test_imports_that_the_rules_allow(tmp_path, path, text):
  assert import_rules.check(make(tmp_path, **{"apps/trainer/step.py": "", path: text})) == []


@pytest.mark.parametrize(
  ("path", "text", "violation"),
  [
    (
      "apps/train.py",
      "import ov_models.vit, numpy",
      "apps/train.py:1: imports numpy: add @pypi//:numpy to the deps of //apps:train",
    ),
    (
      "apps/train.py",
      "import os",
      "apps/BUILD.bazel:1: //apps:train depends on //packages/ov-models:ov-models, which none of",
    ),
    (
      VIT_TEST,
      "from . import vit\nfrom .vit_more_test import x",
      f"{VIT_TEST}:2: imports ov_models.vit_more_test, which neither a target nor",
    ),
    (VIT, "import numpy, torch", f"{VIT}:1: imports torch, which neither a target nor"),
    (VIT, "import numpy, wandb", f"{VIT}:1: imports wandb, which users may lack: import it inside"),
  ],
)
def test_deps(tmp_path, path, text, violation):
  found = agreement.check_deps(make(tmp_path, **{path: text}))
  assert [str(f)[: len(violation)] for f in found] == [violation]


def test_scripts_of_the_other_environment_need_no_deps(tmp_path):
  build = VIT.replace("ov_models/vit.py", "BUILD.bazel").replace("ov-models", "ov-convert")
  library = 'ov_py_library(name = "ov-convert", srcs = glob(["**/*.py"]))\n'
  tree = make(tmp_path, **{build: library, CLIENT: "import torch\n"})
  assert agreement.check_deps(tree) == []


def test_dep_of_a_dep_is_not_enough(tmp_path):
  """Bazel accepts it, because :b provides the files of ov-models."""
  build = """
    ov_py_library(name = "b", srcs = ["b.py"], deps = ["//packages/ov-models"])
    ov_py_binary(name = "train", srcs = ["train.py"], deps = [":b"])
    """
  apps = {"apps/b.py": "import ov_models.vit", "apps/train.py": "import apps.b, ov_models.vit"}
  found = agreement.check_deps(make(tmp_path, **{"apps/BUILD.bazel": build, **apps}))
  wanted = "imports ov_models.vit: add //packages/ov-models:ov-models to the deps of //apps:train"
  assert list(map(str, found)) == [f"apps/train.py:1: {wanted}"]


def test_optional_module_inside_a_function(tmp_path):
  assert (
    agreement.check_deps(make(tmp_path, **{VIT: "import numpy\ndef f():\n  import wandb"})) == []
  )


@pytest.mark.parametrize(
  ("dependencies", "violation"),
  [
    ("[]", "1: numpy is imported: add it to dependencies"),
    ('["numpy"]', "2: numpy has no lower bound: write numpy>=..."),
    ('["numpy>=3"]', "2: numpy >=3 excludes the lock's 2.4.6"),
    ('["numpy>=2", "flax>=1"]', "2: flax is declared, but the library does not import it"),
  ],
)
def test_pyproject(tmp_path, dependencies, violation):
  tree = make(tmp_path, **{PROJECT: f"[project]\ndependencies = {dependencies}"})
  assert list(map(str, agreement.check_pyproject(tree))) == [f"{PROJECT}:{violation}"]


def test_pyproject_requires_deferred_imports_as_extras(tmp_path):
  code = {VIT: "import numpy\ndef f():\n  import tensorflow"}
  project = '[project]\ndependencies = ["numpy>=2"]\n'
  lacking = make(tmp_path, **code, **{PROJECT: project})
  (violation,) = agreement.check_pyproject(lacking)
  assert "tensorflow_cpu is imported inside functions: add it to optional" in str(violation)
  extras = '[project.optional-dependencies]\ntfds = ["tensorflow>=2"]\n'
  assert agreement.check_pyproject(make(tmp_path, **code, **{PROJECT: project + extras})) == []


def test_files(tmp_path):
  build = """
    ov_py_library(name = "ov-models", srcs = ["ov_models/vit.py", "ov_models/gone.py"])
    """
  tree = make(
    tmp_path,
    **{"packages/ov-models/BUILD.bazel": build, "packages/ov-data/ov_data/loader.py": "import os"},
  )
  assert list(map(str, housekeeping.check_files(tree))) == [
    "packages/ov-data/BUILD.bazel:1: is missing",
    "packages/ov-data/CHANGELOG.md:1: is missing",
    "packages/ov-data/README.md:1: is missing",
    "packages/ov-data/pyproject.toml:1: is missing",
    f"{LOADER}:1: is in the srcs of no target of a BUILD.bazel",
    f"{VIT_TEST}:1: no ov_py_test of a BUILD.bazel runs it",
    "packages/ov-models/BUILD.bazel:1: //packages/ov-models:ov-models names"
    " packages/ov-models/ov_models/gone.py, which is not there",
  ]


def test_words(tmp_path):
  place = "/".join(["", "home", "ann", "pictures"])
  tree = make(
    tmp_path, **{"README.md": f"One\n{place}\n", "a.lock": "--index-url https://example.org\n"}
  )
  assert list(map(str, housekeeping.check_words(tree))) == [
    f"README.md:2: {place} is a path of one machine",
    "a.lock:1: names a package index; users have their own",
  ]


def test_language(tmp_path):
  tree = make(tmp_path, **{"README.md": "The run goes\non, `goes on`, `--pictures`.\n"})
  assert list(map(str, language.check_language(tree))) == [
    'README.md:1: "goes on": write resumes, continues'
  ]


def test_native_rules_are_rejected(tmp_path):
  tree = make(tmp_path, **{"apps/BUILD.bazel": 'py_binary(name = "x")'})
  with pytest.raises(ValueError, match="apps/BUILD.bazel:1: py_binary; write ov_py_binary"):
    tree.targets  # noqa: B018


def test_glob_excludes_other_packages(tmp_path):
  for path in ("a.py", "b_test.py", "c/d.py", "e/BUILD.bazel", "e/f.py"):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
  glob = buildfiles.glob
  assert glob(tmp_path, ["**/*.py"], ["**/*_test.py"]) == ["a.py", "c/d.py"]
  assert glob(tmp_path, ["*.py"], []) == ["a.py", "b_test.py"]
