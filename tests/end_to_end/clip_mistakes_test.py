"""Invalid settings and data specific to clip_train give a one-line error and exit code 2."""

import json

import pytest

from apps.demo import scene_shards
from tests.end_to_end import runner


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  folder = tmp_path_factory.mktemp("shards")
  scene_shards.make_scenes_dataset(
    folder, {"train": 60, "heldout": 20}, image_size=32, num_objects=1, workers=0
  )
  return folder


def expect(flags, said, cache):
  code, printed = runner.run(*flags, cache=cache, app=runner.CLIP_TRAIN)
  runner.expect_one_line(printed, code, said)


TINY = runner.tiny_clip()
SETTINGS = {
  "unknown loss": (runner.tiny_clip("clap"), "loss='clap': expected one of openvision, clip"),
  "no loss": ((*TINY, "--config.loss.clip=0", "--config.loss.caption=0"), "every weight is 0"),
  "negative weight": ((*TINY, "--config.loss.clip=-1"), "config.loss.clip=-1"),
  "no text tower": ((*TINY, "--config.model.text="), "needs a text tower"),
  "decoder without a loss": ((*TINY, "--config.loss.caption=0"), "config.loss.caption is 0"),
  "temperature": ((*TINY, "--config.model.scale_init=0"), "scale_init=0.*above 0"),
  "limit of temperature": ((*TINY, "--config.loss.max_scale=-2"), "max_scale=-2"),
  "form": ((*TINY, "--config.loss.form=rings"), "form='rings'; expected"),
  "text tower": ((*TINY, "--config.model.text=Tiny"), "Tiny"),
  "text length": ((*TINY, "--config.model.token_len=2"), "token_len=2; expected at least 3"),
  "pool": ((*TINY, "--config.model.text_options={'pool': 'max'}"), "pool='max'"),
  "source of a tower": (
    (*TINY, "--config.init_from.more=({'include': ('^text/',)},)"),
    "more.0. has no path",
  ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(name, tmp_path, cache):
  flags, said = SETTINGS[name]
  expect((*flags, f"--workdir={tmp_path / 'run'}"), said, cache)


def own_data(shards, workdir, *flags):
  return (
    *TINY,
    "--config.input.demo.train_examples=0",
    f"--config.input.data_dir={shards}",
    "--config.input.split=train",
    f"--config.input.eval_data_dir={shards}",
    "--config.input.eval_split=heldout",
    "--config.total_steps=4",
    "--config.optimizer.schedule.warmup_steps=0",
    f"--workdir={workdir}",
    *flags,
  )


DATA = {
  "alt text": ("--config.input.alt_keys=('title',)", "'title' is in none of the first"),
  "retrieval texts": ("--config.eval.retrieval.caption_keys=('title',)", "'title' is in none"),
  "retrieval data": ("--config.eval.retrieval.dir=nowhere", "no such file or directory"),
  "list of classes": ("--config.eval.zero_shot.classes=nowhere.txt", "neither a set of classes"),
  "classes of folders": (
    "--config.eval.zero_shot.classes=folders",
    "are not stored in class folders",
  ),
  "probe data": ("--config.eval.features.train_dir=nowhere", "no such file or directory"),
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_data(name, shards, tmp_path, cache):
  flag, said = DATA[name]
  expect(own_data(shards, tmp_path / "run", flag), said, cache)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (
      "cat\ndog\n",
      "the label '(circle|square|triangle|cross)' under 'label' is not one of the 2 classes",
    ),
    ("circle\nsquare\ntriangle\n", "the label 'cross' under 'label' is not one of the 3 classes"),
    ("circle\n\nsquare\ntriangle\ncross\n", "classes.txt, line 2 is empty"),
    ("cr\udce8me\nsquare\n", "classes.txt, line 1: byte 0xe8 is not UTF-8"),
  ],
)
def test_classes_that_do_not_match_the_records(content, said, shards, tmp_path, cache):
  classes = tmp_path / "classes.txt"
  classes.write_bytes(content.encode("utf-8", "surrogateescape"))
  flags = own_data(shards, tmp_path / "run", f"--config.eval.zero_shot.classes={classes}")
  expect(flags, said, cache)
  assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))  # before the first step


def test_template_without_a_placeholder(shards, tmp_path, cache):
  classes, templates = tmp_path / "classes.txt", tmp_path / "templates.txt"
  classes.write_text("circle\nsquare\ntriangle\ncross\n")
  templates.write_text("a photo of a {}\na photo\n")
  flags = own_data(
    shards,
    tmp_path / "run",
    f"--config.eval.zero_shot.classes={classes}",
    f"--config.eval.zero_shot.templates={templates}",
  )
  expect(flags, "template 'a photo' .* has no {} for the class name", cache)


def test_split_file_of_another_kind(shards, tmp_path, cache):
  path = tmp_path / "captions_val2014.json"
  path.write_text(json.dumps({"images": [{"file_name": "a.jpg"}], "annotations": []}))
  flags = own_data(shards, tmp_path / "run", f"--config.eval.retrieval.dir={path}")
  expect(flags, r"COCO's own captions_\*\.json need image_root", cache)


def test_texts_processed_differently_than_in_training(tmp_path, cache):
  run = (*TINY, "--config.total_steps=5", f"--workdir={tmp_path}")
  code, printed = runner.run(*run, cache=cache, app=runner.CLIP_TRAIN)
  assert code == 0, printed
  expect(
    (*run, "--config.model.token_len=18"),
    "belongs to texts of 15 tokens, .* but the configuration requires 18 tokens",
    cache,
  )
  expect(
    (
      *TINY,
      f"--workdir={tmp_path / 'b'}",
      f"--config.init_from.path={tmp_path}",
      "--config.seed=7",
    ),
    "text/embed/embedding .*another tokenizer.*config.tokenizer.path",
    cache,
  )
