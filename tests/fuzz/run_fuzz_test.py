"""1,000 damaged configurations, checkpoints, imports and results: none causes a traceback."""

import pytest

from tests.fuzz import fuzz, trials_run

_TRIALS = 112  # trials of each of 9 kinds


@pytest.mark.parametrize("kind", trials_run.KINDS)
def test_damaged_inputs(kind, tmp_path):
  outcomes = fuzz.run(kind, range(_TRIALS), tmp_path, trials_run.KINDS)
  assert outcomes.total() == _TRIALS
  print(kind, dict(outcomes))


@pytest.mark.parametrize("kind", trials_run.KINDS)
def test_undamaged_inputs_are_used(kind, tmp_path):
  trial = trials_run.KINDS[kind](tmp_path)
  assert [trial.check(seed, seed) for seed in trial.seeds] == ["used"] * len(trial.seeds)
