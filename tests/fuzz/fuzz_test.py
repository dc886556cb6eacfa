"""1,000 damaged inputs: none causes a traceback, a hang, or an uncounted loss of data."""

import pytest

from tests.fuzz import fuzz, trials

_TRIALS = 112  # trials of each of 9 kinds


@pytest.mark.parametrize("kind", trials.KINDS)
def test_damaged_inputs(kind, tmp_path):
  outcomes = fuzz.run(kind, range(_TRIALS), tmp_path)
  assert outcomes.total() == _TRIALS
  print(kind, dict(outcomes))
