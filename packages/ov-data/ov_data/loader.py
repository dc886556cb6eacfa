"""Deterministic data loader: batches of numpy arrays, resumable from one integer.

    position -> order -> record -> decode, crop, resize -> token ids -> batch

Everything after `order` runs in a thread pool, mostly in C code that releases the GIL. A few
batches are prefetched and returned in order. All randomness is keyed by (seed, position), so
batches do not depend on the number of hosts and threads.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import os
import time
from typing import Any, Literal, Self

import numpy as np

from ov_data import decode, fs
from ov_data.bad_records import PROCESS_ERRORS, BadRecords, Problem
from ov_data.example import FeatureError
from ov_data.hashing import Uniforms
from ov_data.index import Progress
from ov_data.order import Order, RecordRefs
from ov_data.sources import Dataset, Source
from ov_data.texts import Choice, SelectedTexts, TextReader, TextSpec, Tokenizer

_CROP_SALT = 1
_TASK_ROWS = 8  # rows per task of the thread pool
_REMOTE_THREADS = 8  # threads per core for remote data, which are network-bound


@dataclasses.dataclass(frozen=True)
class _Pending:
  batch: dict[str, Any]
  rows: int  # rows that hold a record, valid or not
  tasks: list[futures.Future[list[Problem]]]


class Loader:
  """Iterator over batches that contain the rows of this host:

      image   uint8 [b, S, S, 3]     ids   int32 [b, T]     mask  bool [b, T], True on real tokens
      valid   bool [b]               index int64 [b], the position in the global stream
      <text>  int32 [b, T of it], for each of `texts`, instead of ids and mask
      <key>   list of b values, for each of `extra_keys`: bytes, int or float; a list if the
              feature has several values; None in invalid rows

  A bad record keeps its row, with `valid` False, padded texts and a black image, so shapes, order
  and resuming do not depend on damage. A record is bad if reading, decoding or tokenizing it fails,
  except for failures of the process or of the whole storage.

  Args:
    sources: one source, or several sources mixed by weight.
    image_size: image size S in pixels.
    batch_size: number of rows of the global batch over all hosts.
    rows: slice of the global batch that this host loads; all rows by default.
    tokenizer: tokenizer, see `ov_data.texts.Tokenizer`.
    text_len: number of tokens T of ids; required without `texts`, ignored otherwise.
    texts: several texts per example, see `TextSpec`; {} for no texts. The caption keys of the
      sources are then read only for captions="all".
    seed: seed of order, crops and choice of captions.
    shuffle, block, window, lanes: see `Order`. `lanes` should be a multiple of the number of hosts.
    position: start position, see `restore`.
    passes: number of passes over one source, or None for an endless stream. The last batch is
      padded with invalid rows. Each `for` loop over a finite loader restarts it.
    fit: "crop" for random crops, "center" or "squash" for evaluation, see `ov_data.decode`.
    captions: "random" or "first" of the texts of an example. "all" encodes the first and adds all
      texts of the source's caption keys as "captions", a list of b lists of str; keys with
      identical texts are used once.
    extra_keys: additional features to return.
    crop, limits: see `ov_data.decode`.
    max_bad_fraction: fraction of bad records above which `TooManyBadRecords` is raised. It is also
      raised if the first 200 records, or all records, are bad.
    threads: number of decoding threads; by default all cores, more for remote data.
    prefetch: number of batches to prefetch.
    progress: callback for the indexing, (bytes done, total bytes).

  Raises:
    ValueError: if the data do not exist or do not match the arguments; see also `Dataset` and
      `Order`.
  """

  def __init__(
    self,
    sources: Source | Sequence[Source],
    *,
    image_size: int,
    batch_size: int,
    tokenizer: Tokenizer,
    text_len: int | None = None,
    texts: Mapping[str, TextSpec] | None = None,
    rows: slice | None = None,
    seed: int = 0,
    shuffle: Literal["global", "block", "none"] = "global",
    block: int = 256,
    window: int = 16,
    lanes: int = 1,
    position: int = 0,
    passes: int | None = None,
    fit: Literal["crop", "center", "squash"] = "crop",
    captions: Choice = "random",
    extra_keys: Sequence[str] = (),
    crop: decode.Crop | None = None,
    limits: decode.Limits = decode.DEFAULT_LIMITS,
    max_bad_fraction: float = 0.1,
    threads: int | None = None,
    prefetch: int = 2,
    progress: Progress | None = None,
  ):
    self.sources = (sources,) if isinstance(sources, Source) else tuple(sources)
    self.image_size = image_size
    self.batch_size = batch_size
    self.lanes = lanes
    self.passes = passes
    self.position = position  # of the next batch to return
    self.wait_seconds = 0.0  # total time that next() waited for data
    self._texts = TextReader(tokenizer, texts, text_len, captions, seed)
    self._seed = seed
    self._fit = fit
    self._extra_keys = tuple(extra_keys)
    self._crop = crop or decode.Crop()
    self._limits = limits
    self._prefetch = prefetch
    self._pending: deque[_Pending] = deque()
    self._check_arguments()
    self.rows = _checked_rows(rows, batch_size)

    lane_rows = batch_size // lanes if lanes > 1 else 1
    block = -(-block // lane_rows) * lane_rows
    fraction = (self.rows.stop - self.rows.start) / batch_size
    self.datasets = [
      Dataset(
        source,
        progress,
        run=block if shuffle == "block" else 1,
        cached_runs=2 * window * (int(lanes * fraction) + 1),
      )
      for source in self.sources
    ]
    for dataset in self.datasets:
      dataset.check_keys(self._extra_keys, captions=self._texts.uses_caption_keys)
    self._texts.check_keys(self.datasets)
    self.order = Order(
      sizes=tuple(map(len, self.datasets)),
      weights=tuple(source.weight for source in self.sources),
      seed=seed,
      shuffle=shuffle,
      block=block,
      window=window,
      lanes=lanes,
      lane_rows=lane_rows,
    )
    self._bad = BadRecords(max_bad_fraction, self.num_examples)
    self._pool = futures.ThreadPoolExecutor(threads or self._default_threads(), "ov-data")

  @classmethod
  def evaluation(
    cls, source: Source, *, fit: Literal["center", "squash"] = "center", **arguments: Any
  ) -> Self:
    """Return a loader for one pass over a source in stored order with the first captions."""
    defaults = dict(shuffle="none", passes=1, captions="first")
    return cls(source, fit=fit, **{**defaults, **arguments})

  def __iter__(self) -> Iterator[dict[str, Any]]:
    if self.passes is not None:
      self._start(0, {})
    return self

  def __next__(self) -> dict[str, Any]:
    while len(self._pending) <= self._prefetch and (pending := self._submit()):
      self._pending.append(pending)
    if not self._pending:
      raise StopIteration
    pending = self._pending.popleft()
    start = time.perf_counter()
    problems = [problem for task in pending.tasks for problem in task.result()]
    self.wait_seconds += time.perf_counter() - start
    self.position += self.batch_size
    self._bad.add(problems, pending.rows)
    return pending.batch

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Stop the threads. The loader cannot be used afterwards."""
    self._pool.shutdown(cancel_futures=True)
    self._pending.clear()

  @property
  def num_examples(self) -> int:
    """Number of usable records over all sources, without those that keep-lists drop."""
    return sum(map(len, self.datasets))

  @property
  def num_batches(self) -> int | None:
    """Number of batches; None for an endless loader."""
    return None if self.passes is None else -(-self._end() // self.batch_size)

  @property
  def epochs(self) -> tuple[float, ...]:
    """Number of epochs completed for each source, as fractions."""
    weights = np.asarray(self.order.weights) / sum(self.order.weights)
    return tuple(
      float(self.position * fraction / size) for fraction, size in zip(weights, self.order.sizes)
    )

  @property
  def skipped(self) -> Counter[str]:
    """Number of bad records among the returned rows, by reason."""
    return self._bad.counts

  @property
  def damaged(self) -> Counter[str]:
    """Number of inputs without a record, by reason; they have no position."""
    return Counter(skip.reason for dataset in self.datasets for skip in dataset.skips)

  @property
  def dropped(self) -> Counter[str]:
    """Number of records that the keep-lists drop, by reason; they have no position."""
    counts: Counter[str] = Counter()
    for dataset in self.datasets:
      counts.update({} if dataset.keep is None else dataset.keep.dropped)
    return counts

  @property
  def fingerprint(self) -> str:
    """Fingerprint over all sources as 16 hex digits, see `Dataset.fingerprint`."""
    return hashlib.sha256(" ".join(d.fingerprint for d in self.datasets).encode()).hexdigest()[:16]

  def locate(self, position: int) -> tuple[str, int]:
    """Return file and byte offset of the record at a position of the global stream."""
    refs = self.order(np.array([position]))
    return self.datasets[refs.source[0]].locate(int(refs.record[0]))

  def state(self) -> dict[str, Any]:
    """Return a JSON-serializable state to resume after the last returned batch."""
    order = dataclasses.asdict(self.order)
    return {
      "position": self.position,
      "fingerprint": self.fingerprint,
      "order": {key: list(v) if isinstance(v, tuple) else v for key, v in order.items()},
      "skipped": dict(self.skipped),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Resume from a state, which may come from another number of hosts.

    Raises:
      ValueError: if the state belongs to other data or another order.
    """
    current = self.state()
    for key, value in {"fingerprint": current["fingerprint"], **current["order"]}.items():
      saved = state[key] if key == "fingerprint" else state["order"].get(key)
      if saved != value:
        raise ValueError(
          f"the data position was saved with {key}={saved}, and now {key}={value}: examples would "
          "be lost or repeated. Use the same data, keep-lists and order, or start at another "
          f"position with Loader(position=...); it was at {state['position']}."
        )
    self._start(state["position"], state["skipped"])

  def _start(self, position: int, skipped: Mapping[str, int]) -> None:
    for pending in self._pending:
      for task in pending.tasks:
        task.cancel()
    self._pending.clear()
    self.position = position
    self._bad.restart(skipped)

  def _end(self) -> int:
    return (self.passes or 0) * len(self.datasets[0])

  def _submit(self) -> _Pending | None:
    """Submit the next batch to the thread pool; return None after the last batch."""
    start = self.position + len(self._pending) * self.batch_size
    if self.passes is not None and start >= self._end():
      return None
    index = start + np.arange(self.rows.start, self.rows.stop, dtype=np.int64)
    if self.passes is not None:
      index[index >= self._end()] = -1
    rows = int(np.count_nonzero(index >= 0))
    size = len(index)
    batch: dict[str, Any] = {
      "image": np.zeros((size, self.image_size, self.image_size, 3), np.uint8),
      **self._texts.blank(size),
      "valid": np.zeros(size, bool),
      "index": index,
      **{key: [None] * size for key in self._extra_keys},
    }
    refs = self.order(index[:rows])
    tasks = [
      self._pool.submit(self._fill, batch, first, min(first + _TASK_ROWS, rows), refs)
      for first in range(0, rows, _TASK_ROWS)
    ]
    return _Pending(batch, rows, tasks)

  def _fill(self, batch: dict[str, Any], first: int, stop: int, refs: RecordRefs) -> list[Problem]:
    """Load rows [first, stop) of a batch in place."""
    problems: list[Problem] = []
    chosen: dict[int, SelectedTexts] = {}

    def catch(row: int) -> contextlib.AbstractContextManager[None]:
      dataset = self.datasets[refs.source[row]]
      return self._bad.catch(problems, lambda: dataset.location(int(refs.record[row])))

    for row in range(first, stop):
      with catch(row):
        dataset = self.datasets[refs.source[row]]
        chosen[row] = self._fill_row(batch, row, dataset, int(refs.record[row]))
    try:
      self._texts.write(batch, [*chosen], [*chosen.values()])
      batch["valid"][[*chosen]] = True
    except PROCESS_ERRORS:
      raise
    except BaseException:  # caused by one text: retry row by row
      for row, texts in chosen.items():
        with catch(row):
          self._texts.write(batch, [row], [texts])
          batch["valid"][row] = True
    for row in range(first, stop) if problems else ():
      if not batch["valid"][row]:
        self._clear_row(batch, row)
    return problems

  def _clear_row(self, batch: dict[str, Any], row: int) -> None:
    """Reset a row after a failure."""
    batch["image"][row] = 0
    for key, blank in self._texts.blank(1).items():
      batch[key][row] = blank[0]
    for key in self._extra_keys:
      batch[key][row] = None

  def _fill_row(
    self, batch: dict[str, Any], row: int, dataset: Dataset, record: int
  ) -> SelectedTexts:
    """Write image and extra features of one row; return its texts."""
    position = int(batch["index"][row])
    source = dataset.source
    keys = (source.image_key, *self._texts.keys(source.caption_keys), *self._extra_keys)
    found = dataset.read(record, keys)
    texts = self._texts.choose(found.texts, source.caption_keys, position)
    if found.image is None:
      raise FeatureError(f"no image under {source.image_key}")
    batch["image"][row] = self._decode(found.image, position)
    features = found.features(source.image_key) if self._extra_keys else {}
    for key in self._extra_keys:
      values = list(features.get(key, ()))
      items = [value.item() if isinstance(value, np.generic) else value for value in values]
      batch[key][row] = items[0] if len(items) == 1 else items
    return texts

  def _decode(self, data: bytes, position: int) -> decode.Pixels:
    if self._fit == "crop":
      uniforms = Uniforms(self._seed, _CROP_SALT, position)
      return decode.random_crop(data, self.image_size, uniforms, self._crop, self._limits)
    return decode.whole(data, self.image_size, self._fit, self._limits)

  def _default_threads(self) -> int:
    remote = any(fs.is_remote(path) for source in self.sources for path in source.all_paths)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) * (_REMOTE_THREADS if remote else 1)

  def _check_arguments(self) -> None:
    for name in ("image_size", "batch_size", "lanes"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
    if self.batch_size % self.lanes:
      raise ValueError(f"batch_size={self.batch_size} is not a multiple of lanes={self.lanes}")
    if self.position < 0:
      raise ValueError(f"position={self.position}: expected 0 or more")
    if self._fit not in ("crop", "center", "squash"):
      raise ValueError(f"fit={self._fit!r}: expected 'crop', 'center' or 'squash'")
    if self.passes is not None and len(self.sources) != 1:
      raise ValueError(
        f"passes={self.passes} over {len(self.sources)} sources: expected one source; "
        "evaluate several sources one after the other"
      )
    if taken := set(self._extra_keys) & {"image", "valid", "index", *self._texts.names}:
      raise ValueError(f"extra_keys: {', '.join(sorted(taken))} are reserved names of the batch")


def _checked_rows(rows: slice | None, batch_size: int) -> slice:
  rows = rows or slice(0, batch_size)
  if rows.step not in (None, 1) or not 0 <= rows.start < rows.stop <= batch_size:
    raise ValueError(f"rows={rows}: expected a slice of the {batch_size} rows of the global batch")
  return rows
