"""Run every command of README.md and docs/ with small settings, or list the reason why not.

Flags and settings are checked for all commands, including those that need hardware or data.
"""

import functools
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tarfile

from absl import flags
from ml_collections import config_flags
import numpy as np
from PIL import Image
import pytest

from apps.configs import base
from apps.launch import check_config
from apps.trainer.names import MOVED, leaves
from ov_serve.testing.models import write_model
from tests.clients import drawn_benchmarks
from tests.docs.commands import Command, collect, pages
from tests.end_to_end import runner

COMMANDS = [command for page in pages() for command in collect(page)]

_APPS = {
  "apps/caption_train.py": runner.CAPTION_TRAIN,
  "apps/clip_train.py": runner.CLIP_TRAIN,
}
_SHORT = (
  "--config.total_steps=4",
  "--config.optimizer.schedule.warmup_steps=1",
  "--config.eval.every=4",
  "--config.checkpoint.every=4",
)
_CAPTION = (*runner.TINY[1:], *_SHORT)
_CLIP = (*runner.tiny_clip()[1:], *_SHORT)
_CHECK = ("--config.batch_size=8", "--check")
_PROTOCOL = (
  *_CHECK,
  "--config.eval.zero_shot.classes=",
  "--config.input.alt_keys=('txt',)",
  "--config.tokenizer.train_vocab_size=64",
)

# Commands to run, in this order because some use earlier outputs. The second column is appended.
RUN = [
  (r"caption_train -- --config=\S+caption_demo.py --workdir=\S+ov-demo$", _CAPTION),
  (r"caption_train -- --config=\S+caption_demo.py:runlocal --workdir=\S+ov-trial$", _CAPTION),
  (r"clip_train -- --config=\S+clip_demo.py --workdir=\S+$", _CLIP),
  (r"clip_train -- --config=\S+clip_demo.py .* --config.eval.suite=vtab", _CLIP),
  (r"clip_train -- --config=\S+clip_demo.py:loss=siglip", _CLIP),
  (r"clip_train -- .*ov-student .*distill", _CLIP),
  (r"clip_train -- .*ov-student-stored .* --store_teacher=", _CLIP),
  (r"clip_train -- .*ov-student-stored (?!.*store_teacher)", _CLIP),
  (r"caption_train -- \S+caption_demo.py \S+ --config.eval_only=True", _CAPTION),
  (r"//tools/compare -- (?!.*--reference)", ()),
  (r"//tools/data:convert -- --input=/data/photos", ()),
  (r"//tools/data:convert -- --input=/data/classes", ()),
  (r"//tools/data:convert -- --input=/data/captions_train2017.json", ()),
  (r"//tools/data:convert -- '--input=/data/tars/part-\{000..099\}.tar'", ()),
  (r"//tools/data:annotate -- ", ()),
  (r"//tools/data:recaption -- .* --model=", ()),
  # The model is random, and the images have 24 pixels.
  (r"//tools/data:keep -- ", ("--where=similarity > -2 and width >= 24",)),
  (r"caption_train -- --workdir=/tmp/photos .* --check", _CHECK),
  (r"clip_train -- --workdir=/tmp/photos-clip .* --check", _CHECK),
  (r"clip_train -- --workdir=/data/runs/datacomp_small", _PROTOCOL),
  (r"clip_train -- --workdir=/data/runs/yfcc15m_s16", _PROTOCOL),
  (r"//tools/preflight -- --topology=h100 --mfu=0.4", ()),
  (r"//tools/preflight -- --topology=h100 --mfu=0.3 .*slip.py:data=cc3m", ()),
  (r"//tools/serve:embed -- ", ()),
  (r"//tools/serve:search -- --index=\S+ '", ()),
  (r"//tools/serve:search -- --index=\S+ --image=", ()),
]

# Commands that do not run here: what they require, and the test of the same code.
NOT_RUN = [
  (r"tools/bazel test", "continuous integration runs it"),
  (r"//docs:html", "Sphinx; //docs:build_site_test"),
  (r"tools/python/venv", "Bazel"),
  (r"user.bazelrc", "it changes the checkout"),
  (r"pip install", "a package index; tests/standalone/pip_install_check.py"),
  (r"//apps:export -- --workdir=/tmp/ov-clip", "PyTorch; //tests/clients:export_test"),
  (r"//apps:export -- --workdir=gs:", "a bucket; //tests/end_to_end:bucket_test"),
  (r"//apps:export -- --from=", "published weights; //apps/exporter:importer_test"),
  (r"//apps:export -- --workdir=/data/run ", "PyTorch; //tests/clients:export_test"),
  (r"^python -c 'import sys, transformers as t", "published vocabularies, and SentencePiece"),
  (r"clip_train -- .*finetune.py:", "imported weights; //tests/end_to_end:finetune_test"),
  (r"caption_train -- --workdir=/tmp/tuned", "imported weights; //apps/trainer:init_from_test"),
  (r"caption_train -- --workdir=/data/runs/b16", "a GPU, imported weights"),
  (r"caption_train -- .*--workdir=/tmp/trial$", "the same command as the one with ov-trial in RUN"),
  (r"caption_train -- .*gs://", "a bucket"),
  (r"clip_train -- --workdir=/data/runs/(datacomp_medium|\w+_b16)", "a GPU; RUN has two of them"),
  (r"//tools/preflight -- .*--mfu=0.3 (?!.*data=cc3m)", "the same command as the one in RUN"),
  (r"//tools/compare -- .*--reference", "a trained model; //tools/compare:compare_test"),
  (r"//tools/preflight -- (?!--topology=h100)", "libtpu or a GPU; //tools/preflight:tpu_test"),
  (r"//tools/serve -- ", "it runs until it is stopped; //packages/ov-serve:serving_test"),
  (r"^npm pack ", "a package registry; //tests/clients:web_page_test writes such a folder"),
  (r"-m http.server", "it runs until it is stopped; //apps/exporter:web_test tests the page"),
  (r"//tools/tpu -- ", "a TPU; //tools/tpu:tpu_test runs those of its README with a fake"),
  (r"//tools/data:recaption -- .* --server=", "a server; //tools/data:captions_test has a fake"),
  (r"//tools/bench", "minutes of an idle machine; //tools/bench:bench_test"),
  (r"//tools/data:convert -- '--input=/data/tars/part-\{00000", "10,000 tars"),
  (r"//tools/data:icons -- ", "100 MB from npm; //tools/data:icons_test"),
  (r"_train -- \S+configs/icons_", "the icons; //apps/configs:settings_test"),
  (r"^gcloud |^python -m ov_data.index gs:", "a bucket"),
]


def _find(pattern: str) -> Command:
  return next(command for command in COMMANDS if re.search(pattern, command.text))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text[:80])
def test_every_command_is_in_exactly_one_table(command: Command):
  """Add new commands to RUN, or to NOT_RUN with a reason."""
  matches = [row for row in (*RUN, *NOT_RUN) if re.search(row[0], command.text)]
  assert len(matches) == 1, f"{command.page}: {command.text}\nmatches {matches}"


def test_every_row_matches_a_command():
  texts = [command.text for command in COMMANDS]
  stale = [row for row in (*RUN, *NOT_RUN) if not any(re.search(row[0], text) for text in texts)]
  assert not stale, f"no page has these commands any more: {stale}"


@functools.cache
def _flags_of(program: str) -> set[str]:
  """Return the flags listed by --help of a program."""
  done = subprocess.run(
    [sys.executable, program, "--help"],
    env=runner.environment(Path.home()),
    capture_output=True,
    text=True,
  )
  assert re.search(r"^\s+--", done.stdout, re.MULTILINE), f"{program} --help: {done.stderr}"
  return {name.replace("[no]", "") for name in re.findall(r"--((?:\[no\])?[\w-]+)", done.stdout)}


PROGRAMS = [command for command in COMMANDS if command.program and command.arguments]


@pytest.mark.parametrize("command", PROGRAMS, ids=lambda command: command.text[:80])
def test_flags_and_settings_exist(command: Command):
  arguments, _, app = "\0".join(command.arguments).partition("\0--\0")
  known = {*_flags_of(command.program), "config"}
  for flag in re.findall(r"(?:^|\0)--(\w[\w-]*)", arguments):
    assert flag in known, f"{command.page}: {command.program} has no flag --{flag}"
  for words in (arguments.split("\0"), app.split("\0")):
    config = [word for word in words if word.startswith("--config=")]
    if config and "finetune.py:" not in config[0]:  # reads its workdir; see its tests
      captions = re.search(r"caption_demo|icons_caption|openvision2", config[0])
      values = flags.FlagValues()
      given = ["program", *(word for word in words if word.startswith("--config"))]
      config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=given
      )
      values(given)
      check_config(values.config, "caption_config" if captions else "clip_config")


@pytest.mark.parametrize("page", pages(), ids=str)
def test_settings_named_in_text_exist(page: Path):
  known = [*leaves(base.plain(base.clip_config())), *MOVED]
  for name in re.findall(r"--config\.(\w+(?:\.\w+)*)", page.read_text("utf-8")):
    inside = re.match(r"(model\.\w+_options|optimizer\.options|loss\.more)\.", name)
    section = any(leaf.startswith(f"{name}.") for leaf in known)
    assert name in known or inside or section, f"{page}: --config.{name} does not exist"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Create a folder that replaces /; its data/ contains the inputs of the commands."""
  root = tmp_path_factory.mktemp("sandbox")
  rng = np.random.default_rng(0)
  names = [f"{number:03}.jpg" for number in range(400)]
  write_model(root / "tmp/ov-export/safetensors")
  for folder in ("photos", "classes/cat", "classes/dog", "train2017", "tars"):
    (root / "data" / folder).mkdir(parents=True)
  for name in names:
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    for folder in ("photos", "classes/cat" if name < "200" else "classes/dog", "train2017"):
      image.save(root / "data" / folder / name)
  lines = [json.dumps({"file": name, "captions": [f"photo {name}"]}) for name in names]
  (root / "data/photos/captions.jsonl").write_text("\n".join(lines))
  coco = {
    "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
    "annotations": [{"image_id": number, "id": number, "caption": "x"} for number in range(400)],
  }
  (root / "data/captions_train2017.json").write_text(json.dumps(coco))
  for number in range(100):
    with tarfile.open(root / f"data/tars/part-{number:03}.tar", "w") as tar:
      tar.add(root / "data/photos" / names[number], names[number])
      (root / "text").write_text("a caption")
      tar.add(root / "text", names[number].replace("jpg", "txt"))
  drawn_benchmarks.write_all(root / "data/suites", 32)
  return root


@pytest.mark.parametrize(("pattern", "small"), RUN, ids=[row[0] for row in RUN])
def test_command_runs(pattern: str, small: tuple[str, ...], sandbox: Path):
  command = _find(pattern)
  for name, run in (("run_a", "ov-demo"), ("run_b", "ov-trial")):
    if "tools/compare" in command.text:
      shutil.copytree(sandbox / "tmp" / run, sandbox / "tmp" / name)
  words = [re.sub(r"(^|=|')/(data|tmp)/", rf"\1{sandbox}/\2/", word) for word in command.arguments]
  if app := _APPS.get(command.program):
    code, printed = runner.run(*words, *small, cache=sandbox, app=app)
    assert code == 0, printed
    return
  done = subprocess.run(
    [sys.executable, command.program, *words, *small],
    env=runner.environment(sandbox),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
