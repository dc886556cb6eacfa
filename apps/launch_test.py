"""Tests of the error messages for unknown flags and flags of the released code."""

import pytest

from apps import launch
from apps.configs import base
from apps.trainer.stages import resolve_stages

CONFIG = "--config=apps/configs/openvision.py"


@pytest.fixture(autouse=True)
def config_files(tmp_path, monkeypatch):
  """Create a working directory with the configuration file of the flags."""
  (tmp_path / "apps" / "configs").mkdir(parents=True)
  (tmp_path / "apps" / "configs" / "openvision.py").touch()
  monkeypatch.chdir(tmp_path)


def explain(*flags):
  return launch.explain_flags([CONFIG, "--workdir=/tmp/run", *flags])


def test_known_settings_are_accepted():
  flags = ("--config.seed=1", "--noconfig.tensorboard", "--config.model.encoder_options.depth=3")
  assert explain(*flags, "--config.optimizer.learning_rate", "3e-4") is None


def test_all_published_settings_are_explained_at_once():
  message = explain(
    "--config.wandb.project=foo",
    "--config.model.text.dtype=bfloat16",
    "--config.input.data.data_dir=gs://b/x=1",
    "--config.ckpt_steps",
    "500",
    "--config.cpu_unit8=True",
    "--cleanup",
  )
  assert message.split("; ") == [
    "--config.wandb.project is called --config.wandb_project=foo here",
    "--config.model.text.dtype is called --config.model.dtype=bfloat16 here (one for all towers)",
    "--config.input.data.data_dir is called --config.input.data_dir=gs://b/x=1 here",
    "--config.ckpt_steps is called --config.checkpoint.every=500 here",
    "--config.cpu_unit8 of the published code has no counterpart here (images always go to the "
    "device as uint8)",
    "leave it out",
    "--cleanup of the published code is not needed here: a run never deletes its workdir",
  ]


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.batchsize=2", "unknown setting; did you mean --config.batch_size?"),
    ("--config.learning_rate=2", "did you mean --config.optimizer.learning_rate?"),
    ("--config.optimiser.b1=2", "did you mean --config.optimizer.b1?"),
    ("--config.input.datadir=x", "did you mean --config.input.data_dir?"),
    ("--noconfig.tensorbord", "did you mean --config.tensorboard?"),
    (
      "--config.xyz=2",
      "--config.xyz: unknown setting; apps/trainer/run_config.py lists all",
    ),
  ],
)
def test_misspelt_setting_suggests_nearest_name(flag, message):
  assert message in explain(flag)


@pytest.mark.parametrize(
  ("flag", "new"),
  [
    ("--config.model.caption_weight=2", "--config.loss.caption=2"),
    ("--config.model.z_loss", "--config.loss.z_loss"),
    ("-config.model.label_smoothing=0.1", "-config.loss.label_smoothing=0.1"),
    ("--config.model.encoder=x", "--config.model.encoder=x"),
  ],
)
def test_renamed_flags(flag, new):
  assert launch.rename_flag(flag) == new


def test_renamed_setting_in_file():
  config = base.caption_config()
  config.model.caption_weight = 2.0
  config.stages = ({"name": "a"}, {"name": "b", "model.caption_weight": 3.0})
  found = launch.check_config(config, "caption_config")
  assert found.loss.caption == 2.0
  assert [stage.config.loss.caption for stage in resolve_stages(found)] == [2.0, 3.0]


def test_conflicting_names_of_one_setting():
  config = base.caption_config()
  config.model.caption_weight, config.loss.caption = 2.0, 3.0
  with pytest.raises(ValueError, match="config.model.caption_weight=2.0 is now called"):
    launch.check_config(config, "caption_config")


def test_path_of_published_configuration():
  message = launch.explain_flags(["--config=src/configs/openvision.py:res=84"])
  assert message == (
    "--config=src/configs/openvision.py: the file does not exist; did you mean "
    "--config=apps/configs/openvision.py?"
  )
  assert "recipes are in apps/configs" in launch.explain_flags(["--config=my.py"])
