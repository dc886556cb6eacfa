"""What the input of a train step costs: batches, the first one, the index, resuming, memory.

Images for each CPU second are those of `ov_data.Loader` end to end: read, parse, decode, crop,
resize, tokenise, batch. Beside it run a loader as one writes it first and the published pipeline,
see `tools.bench.input_peers`.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.harness import Benchmark, Case, Goal, Plot, Ratio, Stopwatch, measured, rates
from tools.bench.input_data import (
  BATCH,
  KINDS,
  LARGE,
  SMALL,
  TINY_PIXELS,
  TINY_RECORDS,
  TINY_TEXT_LEN,
  Data,
  Kind,
  encoded,
  open_loader,
)

if TYPE_CHECKING:
  from tools.bench.input_peers import Open

PIXELS = (84, 160, 224, 384)
THREADS = 2
WANTED = {84: 1000, 224: 600}  # images for each CPU second, from JPEGs of 512 x 384
PEER_PIXELS = {SMALL: PIXELS, LARGE: (224,)}
# Row -> processes, and threads of each.
SPREAD_PIXELS = 224
SPREAD = {
  "1 process, 1 thread": (1, 1),
  "1 process, 2 threads": (1, 2),
  "2 processes, 1 thread each": (2, 1),
}
# Row -> shards in the folder, and how often each stands in the list of shards.
RESUMED = {
  "10^6 records": (10, 1),
  "10^8 records": (1000, 1),
  "10^9 records, simulated": (10, 1000),
}
STEPS = (1_000, 10_000, 100_000)
FLAT = 1.05  # of the memory after the fewest steps

Batches = Iterable[Mapping[str, Any]]


def make(scratch: Path) -> Benchmark:
  """The cases; `scratch` is a folder for the shards, 0.8 GB."""
  from tools.bench import input_peers

  data = Data(scratch)
  peers = {"Pillow": input_peers.pillow}
  notes = []
  if input_peers.has_tensorflow():
    peers["tf.data"] = input_peers.tf_data
  else:
    notes.append("Without tf.data, for TensorFlow is not installed")
  cases, ratios = [], []
  for kind in KINDS:
    cases.append(Case(f"{kind.name}, decoded only", functools.partial(_decode_only, kind)))
    for px in PIXELS:
      cases.append(Case(_row(kind, px), _Passes(functools.partial(_ours, data, kind, px))))
      for peer, opens in peers.items() if px in PEER_PIXELS.get(kind, ()) else ():
        theirs = _row(kind, px, peer)
        cases.append(Case(theirs, _Passes(functools.partial(_theirs, opens, data, kind, px))))
        ratios.append(Ratio(_row(kind, px), theirs))
  spread = {f"{SPREAD_PIXELS} px, {row}": shape for row, shape in SPREAD.items()}
  for row, shape in spread.items():
    cases.append(Case(row, functools.partial(_spread, data, *shape), warm_up=False))
  ratios += [Ratio(row, next(iter(spread))) for row in list(spread)[1:]]
  for row, indexed in {"first batch, index there": True, "first batch, no index": False}.items():
    cases.append(Case(row, functools.partial(_first_batch, data, indexed), warm_up=False))
  cases.append(Case("index", functools.partial(_index, data), warm_up=False))
  for row, (shards, copies) in RESUMED.items():
    run = functools.partial(_resume, data, shards, copies)
    cases.append(Case(f"resume in {row}", run, warm_up=False))
  return Benchmark(
    "data",
    f"Batches of {BATCH} made pictures with texts of 128 tokens, by {THREADS} threads, out of "
    "shards in the page cache.",
    cases,
    ratios=ratios,
    goals=[
      Goal(_row(SMALL, px), "images_per_cpu_s", wanted, at_least=True)
      for px, wanted in WANTED.items()
    ],
    batch=BATCH,
    notes=notes,
    plots=[
      _plot("Input by format", {kind.name: (kind, ()) for kind in KINDS}),
      _plot(f"Input from {SMALL.name}", {
        "ov-data": (SMALL, ()), **{peer: (SMALL, (peer,)) for peer in peers}
      }),
    ],
  )  # fmt: skip


def make_memory(scratch: Path) -> Benchmark:
  """The memory of a process that loads and does nothing else, as it goes on."""
  data = Data(scratch)
  cases = [
    Case(f"{steps:,} steps", functools.partial(_many_steps, data, steps), warm_up=False)
    for steps in STEPS
  ]
  ratios = [Ratio(case.name, cases[0].name) for case in cases[1:]]
  points = [(steps, case.name) for steps, case in zip(STEPS, cases, strict=True)]
  return Benchmark(
    "data_memory",
    f"A process that loads pictures of {TINY_PIXELS} x {TINY_PIXELS} pixels and does nothing else, "
    "after so many batches of one.",
    cases,
    ratios=ratios,
    goals=[Goal(ratio.name, "resident_mib", FLAT) for ratio in ratios],
    batch=1,
    plots=[Plot("Memory of the input over time", "batches", "resident_mib", {"": points})],
  )


def _row(kind: Kind, px: int, *peer: str) -> str:
  return ", ".join([kind.name, f"{px} px", *peer])


def _plot(title: str, lines: Mapping[str, tuple[Kind, tuple[str, ...]]]) -> Plot:
  points = {
    label: [(px, _row(kind, px, *peer)) for px in PIXELS] for label, (kind, peer) in lines.items()
  }
  return Plot(title, "side of the crop, pixels", "images_per_cpu_s", points)


class _Passes:
  """Goes through the batches of a pass; what makes them is opened once, and not measured."""

  def __init__(self, opens: Callable[[], Callable[[], Batches]]):
    self._opened = functools.cache(opens)

  def __call__(self) -> dict[str, float]:
    one_pass = self._opened()
    return rates("images", *measured(lambda: sum(len(batch["image"]) for batch in one_pass())))


def _ours(data: Data, kind: Kind, px: int) -> Callable[[], Batches]:
  loader = open_loader(data.of(kind), data.tokenizer, image_size=px, threads=THREADS, passes=1)
  return loader.__iter__


def _theirs(opens: "Open", data: Data, kind: Kind, px: int) -> Callable[[], Batches]:
  return opens(data.of(kind), px, THREADS, data.tokenizer)


def _decode_only(kind: Kind) -> dict[str, float]:
  from tools.bench import input_peers

  pictures = encoded(kind)
  return rates(
    "images", *measured(lambda: input_peers.full_decode(pictures, kind.records, THREADS))
  )


def _spread(data: Data, processes: int, threads: int) -> dict[str, float]:
  """Every process loads its rows of each batch, as the hosts of a run do."""
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
  found, clock = _in_processes("one_pass", arguments)
  images, cpu = (sum(one[what] for one in found) for what in ("images", "cpu_s"))
  return {
    **rates("images", images, {"cpu_s": cpu, "clock_s": clock}),
    "resident_mib": max(one["resident_mib"] for one in found),
  }


def _first_batch(data: Data, indexed: bool) -> dict[str, float]:
  """From the start of the process; the index is what a first run leaves."""
  if not indexed:
    _remove_indexes(data.large)
  arguments = {**_places(data, data.large), "image_size": SPREAD_PIXELS, "threads": THREADS}
  (found,), clock = _in_processes("first_batch", [arguments], imported=False)
  return {**found, "clock_s": clock}


def _index(data: Data) -> dict[str, float]:
  from ov_data.index import load_indexes

  _remove_indexes(data.large)
  shards = sorted(map(str, data.large.glob("*.tfrecord")))
  watch = Stopwatch()
  indexes = load_indexes(shards)
  cpu, clock = watch.read()
  megabytes = sum(index.size for index in indexes) / 1e6
  return {"cpu_s": cpu, "clock_s": clock, "mb_per_cpu_s": megabytes / cpu}


def _resume(data: Data, shards: int, copies: int) -> dict[str, float]:
  """Resumes a few batches before the end of the first epoch."""
  position = shards * copies * TINY_RECORDS - 10 * BATCH
  arguments = {**_tiny(data, shards), "position": position, "copies": copies}
  (found,), _ = _in_processes("resume", [arguments])
  return found


def _many_steps(data: Data, steps: int) -> dict[str, float]:
  (found,), _ = _in_processes("many_steps", [{**_tiny(data, 1), "batch_size": 1, "steps": steps}])
  return found


def _tiny(data: Data, shards: int) -> dict[str, Any]:
  settings = {"image_size": TINY_PIXELS, "text_len": TINY_TEXT_LEN, "threads": 1}
  return {**_places(data, data.tiny(shards)), **settings}


def _places(data: Data, folder: Path) -> dict[str, str]:
  return {"folder": str(folder), "tokenizer": str(data.tokenizer)}


def _remove_indexes(folder: Path) -> None:
  for sidecar in folder.glob("*.ovidx"):
    sidecar.unlink()


def _in_processes(
  task: str, arguments: list[dict[str, Any]], imported: bool = True
) -> tuple[list[dict[str, float]], float]:
  from tools.bench import input_process  # which imports ov_data

  return input_process.run(task, arguments, imported=imported)
