"""50,000 damaged inputs of a run, different from those in `run_fuzz_test`.

Under Bazel each test is a separate process, so the memory limit applies to 2,778 inputs:
tensorstore leaks about 0.8 MB per restored checkpoint.
"""

import pytest

from tests.fuzz import fuzz, trials_run

_FIRST, _TRIALS = 1000, 2778  # trials of each half of 9 kinds


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", trials_run.KINDS)
def test_damaged_inputs(kind, half, tmp_path):
  first = _FIRST + half * _TRIALS
  outcomes = fuzz.run(kind, range(first, first + _TRIALS), tmp_path, trials_run.KINDS)
  assert outcomes.total() == _TRIALS
  print(kind, dict(outcomes))
