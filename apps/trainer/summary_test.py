"""Tests that a run with missing files does not report success."""

from types import SimpleNamespace

import pytest

from apps.trainer.errors import UserError
from apps.trainer.sinks import MetricWriter
from apps.trainer.summary import check_outputs


def make_run(folder, *, step=8, saved=8, eval_only=False):
  for name in ("config.json", "tokenizer"):
    (folder / name).touch()
  return SimpleNamespace(
    config=SimpleNamespace(eval_only=eval_only),
    workdir=SimpleNamespace(path=folder, uri=str(folder)),
    checkpoints=SimpleNamespace(
      directory=folder / "checkpoints", wait=lambda: None, finished_step=lambda: saved
    ),
    writer=MetricWriter(folder),
    step=step,
  )


def test_complete_run_passes(tmp_path):
  check_outputs(make_run(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "tokenizer"])
def test_missing_file_is_reported(tmp_path, name):
  run = make_run(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(UserError, match=f"lacks {name}, which the run wrote"):
    check_outputs(run)


@pytest.mark.parametrize("saved", [None, 4])
def test_missing_last_checkpoint_is_reported(tmp_path, saved):
  with pytest.raises(UserError, match="lacks .*checkpoints/8, which the run wrote"):
    check_outputs(make_run(tmp_path, saved=saved))


def test_replaced_metrics_are_reported(tmp_path):
  run = make_run(tmp_path)
  (tmp_path / "metrics.jsonl").rename(tmp_path / "moved")
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(UserError, match="was removed or replaced"):
    check_outputs(run)


def test_evaluation_is_not_checked(tmp_path):
  check_outputs(make_run(tmp_path, saved=None, eval_only=True))
