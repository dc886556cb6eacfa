"""Runs trials on randomly damaged inputs, within limits on time and memory.

Trial number i of a kind depends on (kind, i) alone: a failure names both, and `run(kind, [i])`
repeats it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
from pathlib import Path
import resource
import signal
from typing import Any
import zlib

import numpy as np

from tests.fuzz import trials
from tests.fuzz.mutations import mutate

MAX_SECONDS = 20  # of one trial; most take milliseconds
MAX_BYTES = 2 << 30  # resident memory of the process


def run(
  kind: str,
  numbers: Iterable[int],
  folder: Path,
  kinds: Mapping[str, Callable[[Path], Any]] = trials.KINDS,
) -> Counter[str]:
  """Run trials of one kind.

  Args:
    kind: a key of `kinds`.
    numbers: of the trials.
    folder: scratch space.
    kinds: `trials.KINDS`, or those of `trials_run`.

  Returns:
    How many inputs were "used", "counted" and "refused".

  Raises:
    AssertionError: a trial failed, hung or took too much memory; names it.
  """
  trial = kinds[kind](folder)
  outcomes: Counter[str] = Counter()
  for number in numbers:
    rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
    original = trial.seeds[rng.integers(len(trial.seeds))]
    data = mutate(rng, original)
    try:
      with _alarm(MAX_SECONDS):
        outcomes[trial.check(data, original)] += 1
    except trials.Refused:
      outcomes["refused"] += 1
    except BaseException as error:
      error.add_note(
        f"trial {number} of kind {kind!r}; repeat it with run({kind!r}, [{number}], ...)"
      )
      raise
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  assert peak < MAX_BYTES, (
    f"{peak >> 20} MiB of resident memory after {outcomes.total()} trials of {kind}"
  )
  return outcomes


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
  def fail(*_: object) -> None:
    raise AssertionError(f"no result after {seconds} s")

  before = signal.signal(signal.SIGALRM, fail)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
