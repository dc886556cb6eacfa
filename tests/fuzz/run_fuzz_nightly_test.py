"""50,000 damaged inputs of a run, other ones than in `run_fuzz_test`."""

import pytest

from tests.fuzz import fuzz, trials_run

_FIRST, _TRIALS = 1000, 5556  # of each of 9 kinds


@pytest.mark.parametrize("kind", trials_run.KINDS)
def test_damaged_inputs(kind, tmp_path):
  outcomes = fuzz.run(kind, range(_FIRST, _FIRST + _TRIALS), tmp_path, trials_run.KINDS)
  assert outcomes.total() == _TRIALS
  print(kind, dict(outcomes))
