"""Names of flags that are wrong, or of the published code, are answered with the remedy."""

import pytest

from apps import launch

CONFIG = "--config=apps/configs/openvision.py"


@pytest.fixture(autouse=True)
def config_files(tmp_path, monkeypatch):
  """A working directory with the configuration file that the flags name."""
  (tmp_path / "apps" / "configs").mkdir(parents=True)
  (tmp_path / "apps" / "configs" / "openvision.py").touch()
  monkeypatch.chdir(tmp_path)


def explain(*flags, base="clip_config"):
  return launch.explain_flags(base, [CONFIG, "--workdir=/tmp/run", *flags])


def test_known_settings_need_no_explanation():
  flags = ("--config.seed=1", "--noconfig.tensorboard", "--config.model.encoder_options.depth=3")
  assert explain(*flags, "--config.optimizer.learning_rate", "3e-4") is None


def test_all_settings_of_a_published_script_are_answered_at_once():
  said = explain(
    "--config.wandb.project=foo",
    "--config.model.text.dtype=bfloat16",
    "--config.input.data.data_dir=gs://b/x=1",
    "--config.ckpt_steps",
    "500",
    "--config.cpu_unit8=True",
    "--cleanup",
  )
  assert said.split("; ") == [
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
  ("flag", "said"),
  [
    ("--config.batchsize=2", "no such setting; did you mean --config.batch_size?"),
    ("--config.learning_rate=2", "did you mean --config.optimizer.learning_rate?"),
    ("--config.optimiser.b1=2", "did you mean --config.optimizer.b1?"),
    ("--config.input.datadir=x", "did you mean --config.input.data_dir?"),
    ("--noconfig.tensorbord", "did you mean --config.tensorboard?"),
    ("--config.xyz=2", "--config.xyz: there is no such setting; apps/configs/base.py lists all"),
  ],
)
def test_a_misspelt_setting_gets_the_nearest_name(flag, said):
  assert said in explain(flag)


def test_the_answer_depends_on_the_app():
  weight = "--config.coca_caption_loss_weight=2"
  assert "--config.loss.caption=2" in explain(weight)
  assert "--config.model.caption_weight=2" in explain(weight, base="caption_config")
  retrieval = explain("--config.evals.retrieval.data_dir=/d", base="caption_config")
  assert "no text tower, so nothing is retrieved" in retrieval


def test_the_path_of_a_published_configuration_is_answered():
  said = launch.explain_flags("clip_config", ["--config=src/configs/openvision.py:res=84"])
  assert said == (
    "--config=src/configs/openvision.py: there is no such file; did you mean "
    "--config=apps/configs/openvision.py?"
  )
  assert "recipes are in apps/configs" in launch.explain_flags("clip_config", ["--config=my.py"])
