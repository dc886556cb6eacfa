"""Tests that `--check` and the run report the same errors before training."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from apps import demo_data
from apps.configs import caption_demo
from apps.configs.base import resolve
from apps.demo import scene_shards
from apps.evaluators import make_evaluators
from apps.trainer.check import check_run
from apps.trainer.checkpoint import Checkpoints
from apps.trainer.errors import UserError, user_errors
from apps.trainer.hooks import Hooks
from apps.trainer.hosts import Hosts
from apps.trainer.loop import run_training
from apps.trainer.progress import Terminal
from apps.trainer.summary import Report
from apps.trainer.workdir import Workdir
import ov_data
from ov_data import keep_list, recaptions

BLOCK = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  sizes = {"train": 40, "heldout": 8}
  scene_shards.make_scenes_dataset(folder, sizes, image_size=32, num_objects=1, workers=0)
  return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir with a checkpoint of another model."""
  workdir = tmp_path_factory.mktemp("trained")
  save(workdir, 4, {"stage": "main", "tokenizer": "a1"})
  return workdir


def save(workdir, step, metadata):
  state = {"params": {"encoder": {"cls": jnp.zeros(32)}}, "step": jnp.int32(step)}
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(step, state, metadata)


def make_config(data, settings):
  config = caption_demo.get_config("runlocal")
  config.model.update(encoder="mu/16", image_size=32)
  config.model.encoder_options, config.model.decoder_options = {}, BLOCK
  config.input.demo.train_examples = 0
  config.input.update(data_dir=str(data), split="train")
  config.input.update(eval_data_dir=str(data), eval_split="heldout")
  config.update(batch_size=8, total_steps=4, tensorboard=False, compile_cache="")
  config.optimizer.schedule.warmup_steps = 0
  config.eval.update(batch_size=8, caption_examples=4)
  with user_errors():
    return resolve(config).with_settings(settings)


def check(data, path, settings):
  config = demo_data.prepare(make_config(data, settings), Workdir(path), Terminal(active=False))
  check_run(config, Workdir(path), make_evaluators, Terminal(active=False))


def train(data, path, settings):
  terminal = Terminal(active=False)
  config = demo_data.prepare(make_config(data, settings), Workdir(path), terminal)
  with Hosts(terminal.phase, **config.hosts.to_dict()) as hosts:
    run_training(config, Workdir(path), make_evaluators, terminal, Hooks([hosts, Report()]))


ELSEWHERE = "no such file or directory|there is no such"
MISTAKES = {
  "init_from": (
    {"init_from.path": "{tmp}/no"},
    "config.init_from.path=.*folder does not exist; expected",
  ),
  "ft_from": (
    {"ft_from": "{tmp}/no"},
    "config.ft_from=.*folder does not exist; expected the workdir",
  ),
  "a file to start from": ({"ft_from": "{tmp}/file"}, "config.ft_from=.*is a file; expected"),
  "both names": (
    {"ft_from": "/a", "init_from.path": "/b"},
    "config.ft_from=/a and config.init_from.path=/b are two names of one setting",
  ),
  "further source": (
    {"init_from.more": ({"path": "{tmp}/no"},)},
    r"init_from.more\[0\].path=.*does not exist",
  ),
  "step of a source": (
    {"init_from.path": "{trained}", "init_from.step": 7},
    r"no checkpoint of step 7 .* there are \[4\]",
  ),
  "part of a source": (
    {"init_from.path": "{trained}", "init_from.part": "avg"},
    "part='avg'; expected",
  ),
  "average": ({"init_from.path": "{trained}", "init_from.part": "ema"}, "holds no 'ema'; it holds"),
  "regex of a source": (
    {"init_from.path": "{trained}", "init_from.include": ("^encdoer",)},
    "include='.encdoer' matches no parameter",
  ),
  "broken regex": (
    {"init_from.path": "{trained}", "init_from.exclude": ("(",)},
    "is not a valid regular expression",
  ),
  "way of resizing": ({"init_from.patch_resize": "cubic"}, "patch_resize='cubic'; expected one of"),
  "nothing that fits": (
    {"init_from.path": "{trained}", "init_from.include": ("norm/scale$",)},
    "nothing in .* fits the model",
  ),
  "vocabulary": (
    {"tokenizer.path": "{tmp}/vocab.txt"},
    "tokenizer.path=.*: the path does not exist",
  ),
  "broken vocabulary": ({"tokenizer.path": "{tmp}/file"}, "PAD|token"),
  "training data": ({"input.data_dir": "{tmp}/no"}, ELSEWHERE),
  "held-out data": ({"input.eval_data_dir": "{tmp}/no"}, ELSEWHERE),
  "list of classes": ({"eval.zero_shot.classes": "{tmp}/no.txt"}, "neither a set of classes"),
  "templates": (
    {"eval.zero_shot.classes": "{tmp}/classes.txt", "eval.zero_shot.templates": "{tmp}/no.txt"},
    "neither a set of templates",
  ),
  "classes of other data": (
    {"eval.zero_shot.classes": "{tmp}/classes.txt"},
    "not one of the 2 classes",
  ),
  "probes": ({"eval.features.train_dir": "{tmp}/no"}, ELSEWHERE),
  "truth": ({"eval.truth_key": "nothing"}, "'nothing' is in none of the first"),
  "wandb": ({"wandb_project": "x"}, "not installed|WANDB_API_KEY"),
  "place of checkpoints": (
    {"checkpoint.dir": "{tmp}/file/below"},
    "config.checkpoint.dir=.* cannot be",
  ),
  "compile cache": (
    {"compile_cache": "{tmp}/file/below"},
    "config.compile_cache=.* cannot be written",
  ),
  "compile store": (
    {"compile_store": "s3://b/x", "compile_cache": "{tmp}"},
    "compile_store=s3://b/x",
  ),
  "predictions": (
    {"eval.per_example": "{tmp}/file"},
    "config.eval.per_example=.* cannot be written",
  ),
  "step to evaluate": (
    {"eval.checkpoint_step": 3, "eval_only": True},
    "checkpoint_step=3: .* holds the steps .none.",
  ),
  "nothing to evaluate": ({"eval_only": True}, "holds no checkpoint; give the --workdir of a run"),
  "batch of a later stage": (
    {"stages": ({"name": "a"}, {"name": "b", "batch_size": 9, "accumulate": 2})},
    "batch_size=9 is not a multiple of 2",
  ),
  "data of a later stage": (
    {"stages": ({"name": "a"}, {"name": "b", "input.data_dir": "{tmp}/no"})},
    ELSEWHERE,
  ),
  "setting of a stage": (
    {"stages": ({"name": "a", "model.imagesize": 84},)},
    "unknown setting 'model.imagesize'; did you mean 'model.image_size'",
  ),
}


def filled(value, places):
  if isinstance(value, str):
    return value.format(**places) if value != "(" else value
  if isinstance(value, tuple):
    return tuple(filled(part, places) for part in value)
  return {k: filled(v, places) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", MISTAKES)
def test_check_and_run_report_the_same_error(name, data, trained, tmp_path, monkeypatch, capsys):
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  monkeypatch.delenv("WANDB_MODE", raising=False)
  (tmp_path / "file").write_text("word\n")
  (tmp_path / "classes.txt").write_text("cat\ndog\n")
  settings, message = MISTAKES[name]
  settings = filled(settings, {"tmp": tmp_path, "trained": trained})
  messages = []
  for number, action in enumerate((check, train)):
    workdir = tmp_path / f"run{number}"
    with pytest.raises(UserError, match=message) as error:
      action(data, workdir, settings)
    messages.append(str(error.value).replace(str(workdir), "WORKDIR"))
    assert not list(workdir.glob("checkpoints/[0-9]*"))
  assert messages[0] == messages[1]


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"stage": "other"}, "checkpoint 2 belongs to stage 'other', the config puts that step"),
    ({"stage": "main"}, "does not fit this run in .* arrays"),
  ],
)
def test_incompatible_checkpoint(metadata, message, data, tmp_path):
  save(tmp_path, 2, metadata)
  for action in (check, train):
    with pytest.raises(UserError, match=message):
      action(data, tmp_path, {})


def test_released_checkpoints_are_not_resumed(data, tmp_path):
  (tmp_path / "checkpoint.npz").mkdir()
  for action in (check, train):
    with pytest.raises(
      UserError, match="cannot be resumed here; .*--config.ft_from=.*checkpoint.npz"
    ):
      action(data, tmp_path, {})


def test_check_prints_evaluators_and_leaves_no_files(data, tmp_path, capsys):
  check(data, tmp_path / "run", {})
  printed = capsys.readouterr().out
  assert "CaptionLikelihood" in printed and "check passed" in printed
  assert list((tmp_path / "run").iterdir()) == []


def test_evaluation_needs_no_training_data(data, tmp_path, capsys):
  workdir = tmp_path / "run"
  train(data, workdir, {"total_steps": 1, "eval.caption_examples": 0})
  check(data, workdir, {"eval_only": True, "input.data_dir": "", "eval.caption_examples": 0})
  assert "check passed" in capsys.readouterr().out
  # The position of another data set does not fit the checkpoint.
  more = tmp_path / "more"
  shutil.copytree(data, more)
  (shard,) = more.glob("train-*.tfrecord")
  shard.rename(more / "train-00000-of-00002.tfrecord")
  shutil.copy(more / "train-00000-of-00002.tfrecord", more / "train-00001-of-00002.tfrecord")
  for index in more.glob("*.json"):
    index.unlink()
  with pytest.raises(UserError, match="data position was saved with fingerprint="):
    check(more, workdir, {"total_steps": 2})
  assert json.loads((workdir / "config.json").read_text())["total_steps"] == 1


def test_new_captions(data, tmp_path):
  dataset = ov_data.Dataset(ov_data.Source(str(data), split="train"))
  folder = tmp_path / "captions"
  folder.mkdir()
  texts = [[f"a new caption {number % 3}"] for number in range(40)]
  recaptions.write(folder, keep_list.identity(dataset), "f1", 40, texts)
  settings = {"input.recaptions": str(folder), "input.caption_keys": ("recaption",)}
  settings["input.alt_keys"] = ("txt",)  # evaluation uses these captions of the held-out data
  train(data, tmp_path / "run", {**settings, "total_steps": 1})
  tokenizer = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text()
  assert "caption" in tokenizer  # trained on the new captions
  with pytest.raises(UserError, match="data position was saved with fingerprint="):
    check(data, tmp_path / "run", {"input.caption_keys": ("txt",), "total_steps": 2})
  sources = ({"path": str(data), "split": "train"},)
  for changed, message in (
    ({"input.split": "heldout"}, "write captions of this source and split"),
    ({"input.recaptions": str(tmp_path / "no")}, "a file is missing"),
    ({"input.alt_keys": ()}, "held-out data has no feature 'recaption'"),
    ({"input.data_dir": "", "input.sources": sources}, "sources its own 'recaptions'"),
  ):
    with pytest.raises(UserError, match=message) as error:
      check(data, tmp_path / "other", settings | changed)
    assert "\n" not in str(error.value)


def test_keep_list(data, tmp_path, capsys):
  dataset = ov_data.Dataset(ov_data.Source(str(data), split="train"))
  for name, stop in (("few", 16), ("more", 24)):
    kept = np.arange(len(dataset)) < stop
    dropped = {"similarity <= 0.25": 40 - stop}
    ov_data.KeepList(keep_list.identity(dataset), kept, dropped).write(str(tmp_path / name))
  few, more = ({"input.keep_list": str(tmp_path / name)} for name in ("few", "more"))
  check(data, tmp_path / "run", few)
  printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
  assert "records 16 dropped by keep-lists 24 epochs 2.00" in printed
  train(data, tmp_path / "run", {**few, "total_steps": 1})
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  facts = report["data"]["Training, stage main"]
  assert facts["records"] == 16 and facts["dropped by the keep-list: similarity <= 0.25"] == 24
  for other in (more, {"input.keep_list": ""}):
    with pytest.raises(UserError, match="data position was saved with fingerprint=") as error:
      check(data, tmp_path / "run", {**other, "total_steps": 2})
    assert "\n" not in str(error.value)
  content = bytearray((tmp_path / "few").read_bytes())
  content[-1] ^= 1
  (tmp_path / "few").write_bytes(content)
  sources = ({"path": str(data), "split": "train", "keep_list": str(tmp_path / "more")},)
  for settings, message in (
    (few, "keep_list=.*few: not a usable keep-list"),
    ({**more, "input.split": "heldout"}, "is for a source of 40 records, and this one has 8"),
    (
      {**more, "input.data_dir": "", "input.sources": sources},
      "each entry of config.input.sources",
    ),
  ):
    for action in (check, train):
      with pytest.raises(UserError, match=message) as error:
        action(data, tmp_path / "other", settings)
      assert "\n" not in str(error.value)
  check(
    data, tmp_path / "other", {"input.data_dir": "", "input.split": "", "input.sources": sources}
  )
