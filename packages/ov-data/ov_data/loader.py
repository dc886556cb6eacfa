"""Batches of numpy arrays from records: deterministic, resumable by one integer.

    position -> order -> record bytes -> parse -> decode, crop, resize -> token ids -> batch

Everything behind `order` runs in a pool of threads whose work is C code without the interpreter
lock. A few batches are under way at a time; they come out in order. All randomness is keyed by
(seed, position), so a batch is a function of its number, on any number of hosts and threads.
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
from ov_data.order import Order, Places
from ov_data.sources import Dataset, Source
from ov_data.texts import Choice, Chosen, TextReader, TextSpec, Tokenizer

_CROP_SALT = 1
_TASK_ROWS = 8  # rows of a batch that one task fills
_REMOTE_THREADS = 8  # for each core: they mostly wait for the network


@dataclasses.dataclass(frozen=True)
class _Pending:
  batch: dict[str, Any]
  rows: int  # that hold a record, broken or not
  tasks: list[futures.Future[list[Problem]]]


class Loader:
  """An iterator of batches, the rows of this host:

      image   uint8 [b, S, S, 3]     ids   int32 [b, T]     mask  bool [b, T], True on real tokens
      valid   bool [b]               index int64 [b], the position in the global stream
      <text>  int32 [b, T of it], for each of `texts`, which take the place of ids and mask
      <key>   list of b values, for each of `extra_keys`: bytes, int or float; a list where the
              feature holds several; None in rows that are not valid

  A broken record keeps its row: `valid` False, padding for texts, black image. So shapes, order and
  resuming never depend on what is broken. A record is broken if anything fails while it is read,
  decoded or tokenized, unless the process or the whole storage is at fault.

  Args:
    sources: one, or several that are mixed by weight.
    image_size: S, pixels.
    batch_size: rows of the global batch, over all hosts.
    rows: the slice of the global batch that this host loads; all of it by default.
    tokenizer: see `ov_data.texts.Tokenizer`.
    text_len: T, tokens of ids; needed without `texts`, unused with them.
    texts: several texts of each example instead of one, see `TextSpec`; {} for none at all. Then
      the caption keys of the sources are read for captions="all" only.
    seed: of order, crops and choice of captions.
    shuffle, block, window, lanes: see `Order`. `lanes` = number of hosts, or a multiple of it.
    position: where to start; see `restore`.
    passes: None for an endless stream; a number to stop after so many passes over one source, the
      last batch filled with rows that are not valid. Each `for` over such a loader starts anew.
    fit: "crop" for random crops, "center" or "squash" for evaluation, see ov_data.decode.
    captions: "random" or "first" among the texts of an example. "all" encodes the first and
      delivers all under the source's caption keys: "captions", a list of b lists of str; of keys
      that hold the same texts only those of the first.
    extra_keys: further features to deliver.
    crop, limits: see ov_data.decode.
    max_bad_fraction: fraction of broken records past which `TooManyBadRecords` stops the run. It
      also stops where the first 200 records, or all, are broken.
    threads: that decode; all cores by default, more where data are remote.
    prefetch: batches under way beside the one that is handed out.
    progress: is told of the indexing, (bytes done, bytes in all).

  Raises:
    ValueError: the data are not there, or not as described; see also `Dataset` and `Order`.
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
    self.position = position  # of the next batch to be handed out
    self.wait_seconds = 0.0  # that the caller of next() has waited for data
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
    share = (self.rows.stop - self.rows.start) / batch_size
    self.datasets = [
      Dataset(
        source,
        progress,
        run=block if shuffle == "block" else 1,
        cached_runs=2 * window * (int(lanes * share) + 1),
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
    """One pass over a source as it lies, whole pictures, first captions."""
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
    """Ends the threads. The loader cannot be used afterwards."""
    self._pool.shutdown(cancel_futures=True)
    self._pending.clear()

  @property
  def num_examples(self) -> int:
    """Usable records over all sources."""
    return sum(map(len, self.datasets))

  @property
  def num_batches(self) -> int | None:
    """Batches until the end; None for an endless loader."""
    return None if self.passes is None else -(-self._end() // self.batch_size)

  @property
  def epochs(self) -> tuple[float, ...]:
    """How often each source has been read so far."""
    weights = np.asarray(self.order.weights) / sum(self.order.weights)
    return tuple(
      float(self.position * share / size) for share, size in zip(weights, self.order.sizes)
    )

  @property
  def skipped(self) -> Counter[str]:
    """Broken records among the rows handed out, by reason."""
    return self._bad.counts

  @property
  def damaged(self) -> Counter[str]:
    """Inputs that were found and give no record, by reason; they have no position."""
    return Counter(skip.reason for dataset in self.datasets for skip in dataset.skips)

  @property
  def fingerprint(self) -> str:
    """16 hex digits of what is read, over all sources, see `Dataset.fingerprint`."""
    return hashlib.sha256(" ".join(d.fingerprint for d in self.datasets).encode()).hexdigest()[:16]

  def locate(self, position: int) -> tuple[str, int]:
    """File and byte offset of the record at a position of the global stream."""
    places = self.order(np.array([position]))
    return self.datasets[places.source[0]].locate(int(places.record[0]))

  def state(self) -> dict[str, Any]:
    """All that is needed to go on behind the last batch handed out; small, fit for JSON."""
    order = dataclasses.asdict(self.order)
    return {
      "position": self.position,
      "fingerprint": self.fingerprint,
      "order": {key: list(v) if isinstance(v, tuple) else v for key, v in order.items()},
      "skipped": dict(self.skipped),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a state, of this or another number of hosts.

    Raises:
      ValueError: the state belongs to other data or another order; says which.
    """
    mine = self.state()
    for key, value in {"fingerprint": mine["fingerprint"], **mine["order"]}.items():
      theirs = state[key] if key == "fingerprint" else state["order"].get(key)
      if theirs != value:
        raise ValueError(
          f"the data position was saved with {key}={theirs}, and now {key}={value}: examples would "
          "be lost or repeated. Use the same data and order, or start at a position of your choice "
          f"with Loader(position=...); it was at {state['position']}."
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
    """Starts the work on the next batch that is not yet under way; None behind the last."""
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
    places = self.order(index[:rows])
    tasks = [
      self._pool.submit(self._fill, batch, first, min(first + _TASK_ROWS, rows), places)
      for first in range(0, rows, _TASK_ROWS)
    ]
    return _Pending(batch, rows, tasks)

  def _fill(self, batch: dict[str, Any], first: int, stop: int, places: Places) -> list[Problem]:
    """Loads the rows first to stop of a batch, in place."""
    problems: list[Problem] = []
    chosen: dict[int, Chosen] = {}

    def caught(row: int) -> contextlib.AbstractContextManager[None]:
      dataset = self.datasets[places.source[row]]
      return self._bad.caught(problems, lambda: dataset.locate(int(places.record[row])))

    for row in range(first, stop):
      with caught(row):
        dataset = self.datasets[places.source[row]]
        chosen[row] = self._fill_row(batch, row, dataset, int(places.record[row]))
    try:
      self._texts.write(batch, [*chosen], [*chosen.values()])
      batch["valid"][[*chosen]] = True
    except PROCESS_ERRORS:
      raise
    except BaseException:  # one of the texts; the others are written without it
      for row, texts in chosen.items():
        with caught(row):
          self._texts.write(batch, [row], [texts])
          batch["valid"][row] = True
    for row in range(first, stop) if problems else ():
      if not batch["valid"][row]:
        self._clear_row(batch, row)
    return problems

  def _clear_row(self, batch: dict[str, Any], row: int) -> None:
    """Undoes what was written before something failed."""
    batch["image"][row] = 0
    for key, blank in self._texts.blank(1).items():
      batch[key][row] = blank[0]
    for key in self._extra_keys:
      batch[key][row] = None

  def _fill_row(self, batch: dict[str, Any], row: int, dataset: Dataset, record: int) -> Chosen:
    """Writes image and extra features of one row; returns its texts."""
    position = int(batch["index"][row])
    source = dataset.source
    keys = (source.image_key, *self._texts.keys(source.caption_keys), *self._extra_keys)
    features = dataset.features(record, keys)
    texts = self._texts.choose(features, source.caption_keys, position)
    image = features.get(source.image_key)
    if not isinstance(image, list) or not image:
      raise FeatureError(f"no image under {source.image_key}")
    batch["image"][row] = self._decode(image[0], position)
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
    remote = any(fs.is_remote(path) for source in self.sources for path in source.places)
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
        f"passes={self.passes} over {len(self.sources)} sources: only one source "
        "has an end; evaluate several one after the other"
      )
    if taken := set(self._extra_keys) & {"image", "valid", "index", *self._texts.names}:
      raise ValueError(f"extra_keys: {', '.join(sorted(taken))} are names of the batch itself")


def _checked_rows(rows: slice | None, batch_size: int) -> slice:
  rows = rows or slice(0, batch_size)
  if rows.step not in (None, 1) or not 0 <= rows.start < rows.stop <= batch_size:
    raise ValueError(f"rows={rows}: expected a part of the {batch_size} rows of the global batch")
  return rows
