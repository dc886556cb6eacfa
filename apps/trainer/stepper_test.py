"""Test of the errors of a stage."""

import types

import pytest

from apps.trainer.errors import UserError
from apps.trainer.run_config import RunConfig
from apps.trainer.stepper import Stepper


@pytest.mark.parametrize("save_error", [None, UserError("no space left")])
def test_failed_evaluation_is_reported_after_a_save(save_error):
  config = RunConfig(total_steps=3)
  stage = types.SimpleNamespace(config=config)
  task = types.SimpleNamespace(batch_keys=(), flops_per_example=1.0)
  stepper = Stepper(None, stage, task, None, None)
  saved = []

  def evaluate(state):
    raise ZeroDivisionError

  def save(step, state, loader):
    saved.append(step)
    if save_error:
      raise save_error

  stepper.evaluate, stepper._save = evaluate, save
  with pytest.raises(ZeroDivisionError):
    stepper._run_periodic(3, {}, None)
  assert saved == [3]
