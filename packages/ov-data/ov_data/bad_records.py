"""Counts and logs the records that cannot be used, and stops a run that has too many of them."""

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

_GRACE_ROWS = 200  # bad records are weighed against at least so many
# Failures of the process or of the storage as a whole. A restart resumes at the same position.
PROCESS_ERRORS = (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)
_STORAGE_ERRNOS = (
  None,  # a remote store
  errno.ENOENT,  # a shard; an image file that is missing is a FeatureError
  errno.ENOMEM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ESTALE,
  errno.ENOTCONN,
  errno.ETIMEDOUT,
)

log = logging.getLogger("ov_data")


class TooManyBadRecords(RuntimeError):
  """More records are broken than `max_bad_fraction` allows, or none is good."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A record that cannot be used.

  Attributes:
    reason: a short phrase, fit for counting.
    place: file and byte offset.
    detail: the message of the error.
  """

  reason: str
  place: str
  detail: str


class BadRecords:
  """The account of a loader.

  Args:
    max_fraction: fraction of bad records past which `add` raises.
    num_examples: records in all; if none of so many is good, `add` raises whatever the fraction.

  Raises:
    ValueError: max_fraction is no fraction.

  Attributes:
    counts: bad records by reason.
  """

  def __init__(self, max_fraction: float, num_examples: int):
    if not 0 <= max_fraction <= 1:
      raise ValueError(f"max_bad_fraction={max_fraction}: expected a fraction from 0 to 1")
    self.counts: Counter[str] = Counter()
    self._max_fraction = max_fraction
    self._num_examples = num_examples
    self._rows = self._bad = 0
    self._unexpected: set[str] = set()  # types of exceptions that were logged with a traceback
    self._lock = threading.Lock()

  def restart(self, counts: Mapping[str, int]) -> None:
    """Begin a new count of rows, with these counts by reason."""
    self.counts = Counter(counts)
    self._rows = self._bad = 0

  @contextlib.contextmanager
  def caught(
    self, problems: list[Problem], locate: Callable[[], tuple[str, int]]
  ) -> Iterator[None]:
    """Turn an exception into a problem. Safe to call from many threads.

    The first exception of each type that a broken record does not explain is logged with its
    traceback, since it may be a bug. Libraries in Rust panic with a `BaseException`.

    Args:
      problems: is appended to.
      locate: returns file and byte offset of the record.

    Raises:
      MemoryError, KeyboardInterrupt, OSError: not the record is broken, but the process is out of
        memory or files, was interrupted, or its storage is gone.
    """
    try:
      yield
    except PROCESS_ERRORS:
      raise
    except BaseException as error:
      if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        raise
      file, offset = locate()
      place = f"{file} at byte {offset}"
      if isinstance(error, DecodeError | FeatureError | RecordError):
        problems.append(Problem(error.reason, place, str(error)))
        return
      name = type(error).__name__
      with self._lock:
        is_new = name not in self._unexpected
        self._unexpected.add(name)
      if is_new:
        log.error("%s: unexpected %s; the record is skipped", place, name, exc_info=error)
      reason = "unreadable file" if isinstance(error, OSError) else f"unexpected {name}"
      problems.append(Problem(reason, place, f"{name}: {error}"))

  def add(self, problems: Sequence[Problem], rows: int) -> None:
    """Count and log the problems among `rows` records.

    Raises:
      TooManyBadRecords: more are bad than allowed, or none is good.
    """
    self._rows += rows
    self._bad += len(problems)
    for problem in problems:
      self.counts[problem.reason] += 1
      count = self.counts[problem.reason]
      if count <= 4 or not count & (count - 1):  # then at 8, 16, 32 ...
        log.warning("skipped %s (%d so far): %s", problem.place, count, problem.detail)
    none_good = self._bad == self._rows >= min(self._num_examples, _GRACE_ROWS)
    if not problems or not (
      none_good or self._bad > self._max_fraction * max(self._rows, _GRACE_ROWS)
    ):
      return
    counts = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
    allowed = "none is good" if none_good else f"more than max_bad_fraction={self._max_fraction}"
    remedy = "Repair the data" if none_good else "Repair the data, or raise max_bad_fraction"
    raise TooManyBadRecords(
      f"{self._bad} of {self._rows} records are broken, {allowed} ({counts}); the last: "
      f"{problems[-1].place}: {problems[-1].detail}. {remedy}."
    )
