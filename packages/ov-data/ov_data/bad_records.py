"""Count and log unusable records, and stop a run that has too many of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import logging
import threading

from ov_data.decode import DecodeError
from ov_data.example import FeatureError
from ov_data.records import RecordError

_MIN_ROWS = 200  # minimum number of rows before `max_fraction` applies
# Failures of the process or of the whole storage, not of one record.
PROCESS_ERRORS = (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)
_STORAGE_ERRNOS = (
  None,  # remote storage
  errno.ENOENT,  # a shard; a missing image file raises FeatureError instead
  errno.ENOMEM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ESTALE,
  errno.ENOTCONN,
  errno.ETIMEDOUT,
)

log = logging.getLogger("ov_data")


class TooManyBadRecords(RuntimeError):
  """More records are broken than `max_bad_fraction` allows, or no record is usable."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """An unusable record.

  Attributes:
    reason: short phrase by which problems are counted.
    location: file and byte offset.
    detail: message of the error.
  """

  reason: str
  location: str
  detail: str


class BadRecords:
  """Statistics of the bad records of a loader.

  Args:
    max_fraction: fraction of bad records above which `add` raises.
    num_examples: total number of records; if that many records are all bad, `add` raises for any
      fraction.

  Raises:
    ValueError: if max_fraction is not in [0, 1].

  Attributes:
    counts: number of bad records by reason.
  """

  def __init__(self, max_fraction: float, num_examples: int):
    if not 0 <= max_fraction <= 1:
      raise ValueError(f"max_bad_fraction={max_fraction}: expected a fraction from 0 to 1")
    self.counts: Counter[str] = Counter()
    self._max_fraction = max_fraction
    self._num_examples = num_examples
    self._rows = self._bad = 0
    self._unexpected: set[str] = set()  # exception types already logged with a traceback
    self._lock = threading.Lock()

  def restart(self, counts: Mapping[str, int]) -> None:
    """Reset the row count and set the counts by reason."""
    self.counts = Counter(counts)
    self._rows = self._bad = 0

  @contextlib.contextmanager
  def catch(self, problems: list[Problem], locate: Callable[[], str]) -> Iterator[None]:
    """Convert an exception into a `Problem`. Thread-safe.

    The first exception of each unexpected type is logged with its traceback, since it may be a
    bug. Rust libraries panic with a `BaseException`.

    Args:
      problems: list to which the problem is appended.
      locate: function that returns the location of the record, "FILE at byte 120".

    Raises:
      MemoryError, KeyboardInterrupt, OSError: if the process ran out of memory or file handles,
        was interrupted, or lost its storage.
    """
    try:
      yield
    except PROCESS_ERRORS:
      raise
    except BaseException as error:
      if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        raise
      location = locate()
      if isinstance(error, DecodeError | FeatureError | RecordError):
        problems.append(Problem(error.reason, location, str(error)))
        return
      name = type(error).__name__
      with self._lock:
        is_new = name not in self._unexpected
        self._unexpected.add(name)
      if is_new:
        log.error("%s: unexpected %s; the record is skipped", location, name, exc_info=error)
      reason = "unreadable file" if isinstance(error, OSError) else f"unexpected {name}"
      problems.append(Problem(reason, location, f"{name}: {error}"))

  def add(self, problems: Sequence[Problem], rows: int) -> None:
    """Count and log the problems among `rows` records.

    Raises:
      TooManyBadRecords: if more records are bad than allowed, or no record is usable.
    """
    self._rows += rows
    self._bad += len(problems)
    for problem in problems:
      self.counts[problem.reason] += 1
      count = self.counts[problem.reason]
      if count <= 4 or not count & (count - 1):  # then at powers of two
        log.warning("skipped %s (%d so far): %s", problem.location, count, problem.detail)
    none_good = self._bad == self._rows >= min(self._num_examples, _MIN_ROWS)
    if not problems or not (
      none_good or self._bad > self._max_fraction * max(self._rows, _MIN_ROWS)
    ):
      return
    counts = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
    allowed = (
      "no record is usable" if none_good else f"more than max_bad_fraction={self._max_fraction}"
    )
    remedy = "Repair the data" if none_good else "Repair the data, or raise max_bad_fraction"
    raise TooManyBadRecords(
      f"{self._bad} of {self._rows} records are broken, {allowed} ({counts}); the last: "
      f"{problems[-1].location}: {problems[-1].detail}. {remedy}."
    )
