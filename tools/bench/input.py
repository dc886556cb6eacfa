"""Benchmark of the input pipeline: throughput, first batch, index, resuming, memory.

Images per CPU second are measured for `ov_data.Loader` end to end: read, parse, decode, crop,
resize, tokenize, batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import contextlib
import functools
import io
import multiprocessing
import os
from pathlib import Path
import time
from typing import Any

from PIL import Image

from ov_data.index import load_indexes
from tools.bench.harness import (
  Benchmark,
  Case,
  Goal,
  Ratio,
  Stopwatch,
  measured,
  rates,
  resident_mib,
)
from tools.bench.input_data import (
  BATCH,
  KINDS,
  SMALL,
  TINY_PIXELS,
  TINY_RECORDS,
  TINY_TEXT_LEN,
  Data,
  Kind,
  encoded,
  open_loader,
)

PIXELS = (84, 160, 224, 384)
FORMATS = ("tfrecord", "tar", "parquet", "array_record")
FORMAT_PIXELS = (84, 224)
# Few records are cached between two passes. The row groups of Parquet have 7 records.
BLOCKS = {"shuffle": "block", "block": 16, "window": 1}
THREADS = 2
GOALS = {84: 1000, 224: 600}  # images per CPU second, from JPEGs of 512 x 384
# Row -> number of processes, and threads per process.
SPREAD_PIXELS = 224
SPREAD = {
  "1 process, 1 thread": (1, 1),
  "1 process, 2 threads": (1, 2),
  "2 processes, 1 thread each": (2, 1),
}
# Row -> number of shards in the folder; all but the first are links.
RESUMED = {"10^6 records": 10, "10^8 records": 1000, "10^9 records": 10_000}

Batches = Iterable[Mapping[str, Any]]


def make(scratch: Path) -> Benchmark:
  """Return the cases. `scratch` is a folder for the shards (0.8 GB)."""
  data = Data(scratch)
  cases = []
  for kind in KINDS:
    cases.append(Case(f"{kind.name}, decoded only", functools.partial(_decode_only, kind)))
    for px in PIXELS:
      cases.append(Case(_row(kind, px), _Passes(functools.partial(_open, data, kind, px))))
  ratios = []
  for px in FORMAT_PIXELS:
    rows = {format: f"{px} px, block order, {format}" for format in FORMATS}
    for format, row in rows.items():
      cases.append(Case(row, _Passes(functools.partial(_open, data, SMALL, px, format, **BLOCKS))))
    ratios += [Ratio(rows[format], rows["tfrecord"]) for format in FORMATS[1:]]
  spread = {f"{SPREAD_PIXELS} px, {row}": shape for row, shape in SPREAD.items()}
  for row, shape in spread.items():
    cases.append(Case(row, functools.partial(_spread, data, *shape), warm_up=False))
  ratios += [Ratio(row, next(iter(spread))) for row in list(spread)[1:]]
  for row, indexed in {"first batch, index present": True, "first batch, no index": False}.items():
    cases.append(Case(row, functools.partial(_first_batch, data, indexed), warm_up=False))
  cases.append(Case("index", functools.partial(_index, data), warm_up=False))
  for row, count in RESUMED.items():
    run = functools.partial(_resume, data, count)
    cases.append(Case(f"resume in {row}", run, warm_up=False))
  return Benchmark(
    "input",
    f"Batches of {BATCH} random images with texts of 128 tokens, by {THREADS} threads, from "
    "shards in the page cache.",
    cases,
    ratios=ratios,
    goals=[
      Goal(_row(SMALL, px), "images_per_cpu_s", goal, at_least=True) for px, goal in GOALS.items()
    ],
    batch=BATCH,
  )


def _row(kind: Kind, px: int) -> str:
  return f"{kind.name}, {px} px"


class _Passes:
  """Iterates over the batches of a pass. Opening the loader is not measured."""

  def __init__(self, opens: Callable[[], Callable[[], Batches]]):
    self._opened = functools.cache(opens)

  def __call__(self) -> dict[str, float]:
    one_pass = self._opened()
    return rates("images", *measured(lambda: sum(len(batch["image"]) for batch in one_pass())))


def _open(
  data: Data, kind: Kind, px: int, format: str = "tfrecord", **order: Any
) -> Callable[[], Batches]:
  arguments = {"image_size": px, "threads": THREADS, "passes": 1, **order}
  loader = open_loader(data.of(kind, format), data.tokenizer, **arguments)
  return loader.__iter__


def _decode_only(kind: Kind) -> dict[str, float]:
  """Decode images at full size with Pillow, without further processing."""
  pictures = encoded(kind)
  decode = lambda number: Image.open(io.BytesIO(pictures[number % len(pictures)])).load()
  with futures.ThreadPoolExecutor(THREADS) as pool:
    return rates("images", *measured(lambda: len(list(pool.map(decode, range(kind.records))))))


def _spread(data: Data, processes: int, threads: int) -> dict[str, float]:
  """Load each batch in several processes, each its own rows, as the hosts of a run do."""
  rows = BATCH // processes
  arguments = [
    {
      **_places(data, data.of(SMALL)),
      "image_size": SPREAD_PIXELS,
      "threads": threads,
      "rows": (number * rows, (number + 1) * rows),
    }
    for number in range(processes)
  ]
  found, clock = run(one_pass, arguments)
  images, cpu = (sum(one[what] for one in found) for what in ("images", "cpu_s"))
  return {
    **rates("images", images, {"cpu_s": cpu, "clock_s": clock}),
    "resident_mib": max(one["resident_mib"] for one in found),
  }


def _first_batch(data: Data, indexed: bool) -> dict[str, float]:
  """Load the first batch in a new process, with or without an existing index."""
  if not indexed:
    _remove_indexes(data.large)
  arguments = {**_places(data, data.large), "image_size": SPREAD_PIXELS, "threads": THREADS}
  (found,), _ = run(first_batch, [arguments | {"started": time.time()}])
  return found


def _index(data: Data) -> dict[str, float]:
  _remove_indexes(data.large)
  paths = sorted(map(str, data.large.glob("*.tfrecord")))
  watch = Stopwatch()
  indexes = load_indexes(paths)
  cpu, clock = watch.read()
  megabytes = sum(index.size for index in indexes) / 1e6
  return {"cpu_s": cpu, "clock_s": clock, "mb_per_cpu_s": megabytes / cpu}


def _resume(data: Data, shards: int) -> dict[str, float]:
  """Resume a few batches before the end of the first epoch."""
  position = shards * TINY_RECORDS - 10 * BATCH
  arguments = {**_tiny(data, shards), "position": position}
  (found,), _ = run(resume, [arguments])
  return found


def _tiny(data: Data, shards: int) -> dict[str, Any]:
  settings = {"image_size": TINY_PIXELS, "text_len": TINY_TEXT_LEN, "threads": 1}
  return {**_places(data, data.tiny(shards)), **settings}


def _places(data: Data, folder: Path) -> dict[str, str]:
  return {"folder": str(folder), "tokenizer": str(data.tokenizer)}


def _remove_indexes(folder: Path) -> None:
  for sidecar in folder.glob("*.ovidx"):
    sidecar.unlink()


def run(
  task: Callable[..., dict[str, float]], arguments: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, float]], float]:
  """Run a task in parallel, in one process per argument.

  Returns:
    The result of each process, and the clock seconds from the end of all imports to the last
    result.
  """
  spawn = multiprocessing.get_context("spawn")
  with contextlib.ExitStack() as stack:
    pools = [stack.enter_context(futures.ProcessPoolExecutor(1, spawn)) for _ in arguments]
    for ready in [pool.submit(_import) for pool in pools]:
      ready.result()
    began = time.perf_counter()
    work = [pool.submit(task, **one) for pool, one in zip(pools, arguments, strict=True)]
    return [one.result() for one in work], time.perf_counter() - began


def _import() -> None:
  """Import this module and ov_data in a new process, before the measurement."""


def first_batch(started: float, **loader: Any) -> dict[str, float]:
  """Open a loader, load a batch, and return the seconds since the process start at `started`."""
  with open_loader(**loader) as opened:
    next(opened)
    return {"cpu_s": time.process_time(), "clock_s": time.time() - started}


def one_pass(rows: tuple[int, int], **loader: Any) -> dict[str, float]:
  """Load the rows of one host in all batches of a pass."""
  watch = Stopwatch()
  opened = open_loader(rows=slice(*rows), passes=1, **loader)
  images = sum(len(batch["image"]) for batch in opened)
  return {"cpu_s": watch.read()[0], "images": images, "resident_mib": resident_mib()[0]}


def resume(position: int, folder: str, **loader: Any) -> dict[str, float]:
  """Open a loader, restore the state of a position, and load a batch.

  Args:
    position: position in the global stream.
    folder: folder of the shards; the catalog is stored next to it.
    **loader: other arguments of `open_loader`.
  """
  os.environ["OV_DATA_CACHE"] = f"{folder} cache"
  watch = Stopwatch()
  opened = open_loader(folder, **loader)
  opened.restore({**opened.state(), "position": position})
  batch = next(opened)
  cpu, clock = watch.read()
  if batch["index"][0] != position or not batch["valid"].all() or opened.epochs[0] > 1:
    raise RuntimeError(f"{opened.num_examples} records, batch {batch['index']}: not at {position}")
  return {"cpu_s": cpu, "clock_s": clock, "resident_mib": resident_mib()[0]}
