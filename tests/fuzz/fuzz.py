"""Run trials on randomly damaged inputs with limits on time and memory.

Trial i of a kind depends only on (kind, i). A failure reports both, and `run(kind, [i])` repeats
it.
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

MAX_SECONDS = 20  # CPU time of one trial; most take milliseconds
MAX_WAIT = 10 * MAX_SECONDS  # clock time of one trial, which depends on other load
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
    numbers: numbers of the trials.
    folder: scratch space.
    kinds: `trials.KINDS`, or those of `trials_run`.

  Returns:
    The number of inputs by outcome: "used", "counted" and "refused".

  Raises:
    AssertionError: if a trial fails, hangs or uses too much memory; the message names the trial.
  """
  trial = kinds[kind](folder)
  outcomes: Counter[str] = Counter()
  for number in numbers:
    rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
    original = trial.seeds[rng.integers(len(trial.seeds))]
    data = mutate(rng, original)
    try:
      with _limits():
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
def _limits() -> Iterator[None]:
  """Fail after `MAX_SECONDS` of CPU time, or `MAX_WAIT` by the clock."""

  def fail(number: int, _: object) -> None:
    took = f"{MAX_SECONDS} s of CPU time" if number == signal.SIGPROF else f"{MAX_WAIT} s"
    raise AssertionError(f"no result after {took}")

  timers = {
    signal.SIGPROF: (signal.ITIMER_PROF, MAX_SECONDS),
    signal.SIGALRM: (signal.ITIMER_REAL, MAX_WAIT),
  }
  before = {number: signal.signal(number, fail) for number in timers}
  for timer, seconds in timers.values():
    signal.setitimer(timer, seconds)
  try:
    yield
  finally:
    for number, (timer, _) in timers.items():
      signal.setitimer(timer, 0)
      signal.signal(number, before[number])
