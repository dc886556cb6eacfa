"""A run whose files are gone at its end does not report success."""

from types import SimpleNamespace

import pytest

from apps.trainer import outputs
from apps.trainer.errors import UserError
from apps.trainer.sinks import MetricWriter


def make_run(folder, *, step=8, saved=8, eval_only=False):
  for name in ("config.json", "tokenizer"):
    (folder / name).touch()
  return SimpleNamespace(
    config=SimpleNamespace(eval_only=eval_only),
    workdir=SimpleNamespace(path=folder, place=str(folder)),
    checkpoints=SimpleNamespace(
      directory=folder / "checkpoints", wait=lambda: None, finished_step=lambda: saved
    ),
    writer=MetricWriter(folder),
    step=step,
  )


def test_a_complete_run_passes(tmp_path):
  outputs.check(make_run(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "tokenizer"])
def test_a_file_that_is_gone_is_named(tmp_path, name):
  run = make_run(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(UserError, match=f"lacks {name}, which the run wrote"):
    outputs.check(run)


@pytest.mark.parametrize("saved", [None, 4])
def test_the_last_checkpoint_must_be_there(tmp_path, saved):
  with pytest.raises(UserError, match="lacks .*checkpoints/8, which the run wrote"):
    outputs.check(make_run(tmp_path, saved=saved))


def test_metrics_that_were_replaced_are_found(tmp_path):
  run = make_run(tmp_path)
  (tmp_path / "metrics.jsonl").rename(tmp_path / "moved")
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(UserError, match="was removed or replaced"):
    outputs.check(run)


def test_an_evaluation_writes_none_of_them(tmp_path):
  outputs.check(make_run(tmp_path, saved=None, eval_only=True))
