"""Tests of the comparison of evaluations with that of the initial model."""

from types import SimpleNamespace

import pytest

from apps.trainer.baseline import Baseline
from apps.trainer.run_config import RunConfig
from apps.trainer.stages import Stage
from apps.trainer.task import Evaluation
import ov_eval


def run_of(folder, fraction):
  """Return a run that collects its lines, its stage and the lines."""
  config = RunConfig().with_settings(
    {"eval.warn_below_initial": fraction, "optimizer.learning_rate": 0.3}
  )
  lines = []
  run = SimpleNamespace(
    workdir=SimpleNamespace(path=folder),
    config=config,
    terminal=SimpleNamespace(phase=lines.append),
  )
  return run, Stage(0, "main", config, 0), lines


def evaluation(recall, nll=2.0):
  return Evaluation(
    (
      ov_eval.Result("img2txt_r1", recall, 100, unit="share"),
      ov_eval.Result("caption_nll", nll, 100, unit="nats"),
    )
  )


@pytest.mark.parametrize(
  ("recall", "nll", "warned"),
  [(0.6, 2.0, None), (0.31, 3.9, None), (0.29, 2.0, "img2txt_r1"), (0.6, 4.1, "caption_nll")],
)
def test_a_far_worse_metric_names_the_learning_rate(tmp_path, recall, nll, warned):
  run, stage, lines = run_of(tmp_path, 0.5)
  hook = Baseline()
  hook.on_start(run)
  hook.on_eval(stage, 0, evaluation(0.6))
  hook.on_eval(stage, 10, evaluation(recall, nll))
  assert len(lines) == (warned is not None)
  if warned:
    assert lines[0].startswith(f"warning: {warned} is ") and "at step 10" in lines[0]
    assert "config.optimizer.learning_rate=0.3" in lines[0] and "\n" not in lines[0]


def test_a_resumed_run_reads_the_first_evaluation(tmp_path):
  (tmp_path / "evaluations").mkdir()
  ov_eval.write_results(
    tmp_path / "evaluations" / "0.json",
    evaluation(0.6).results,
    split="heldout",
    step=0,
    examples_seen=0,
  )
  run, stage, lines = run_of(tmp_path, 0.5)
  hook = Baseline()
  hook.on_start(run)
  hook.on_eval(stage, 10, evaluation(0.1))
  assert len(lines) == 1


@pytest.mark.parametrize("first", [True, False])
def test_no_warning_by_default_or_without_a_first_evaluation(tmp_path, first):
  run, stage, lines = run_of(tmp_path, 0.0 if first else 0.5)
  hook = Baseline()
  hook.on_start(run)
  if first:
    hook.on_eval(stage, 0, evaluation(0.6))
  hook.on_eval(stage, 10, evaluation(0.0))
  assert RunConfig().eval.warn_below_initial == 0 and not lines
