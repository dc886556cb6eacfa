"""50,000 damaged inputs, different from those in `fuzz_test`."""

import pytest

from tests.fuzz import fuzz, trials

_FIRST, _TRIALS = 1000, 5556  # trials of each of 9 kinds


@pytest.mark.parametrize("kind", trials.KINDS)
def test_damaged_inputs(kind, tmp_path):
  outcomes = fuzz.run(kind, range(_FIRST, _FIRST + _TRIALS), tmp_path)
  assert outcomes.total() == _TRIALS
  print(kind, dict(outcomes))
