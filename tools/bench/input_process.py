"""What the input benchmarks do in processes of their own: starts them, and is what they run.

  python -m tools.bench.input_process first_batch '{"folder": ..., "tokenizer": ..., ...}'

Such a process says "ready" once it has imported what it needs, begins when it is sent a line, and
answers with one line of JSON.
"""

from collections.abc import Callable, Sequence
import contextlib
import json
import subprocess
import sys
import time
from typing import Any

from ov_data import shards
from tools.bench import input_data, startup
from tools.bench.harness import Stopwatch, resident_mib


def run(
  task: str, arguments: Sequence[dict[str, Any]], *, imported: bool = True
) -> tuple[list[dict[str, float]], float]:
  """Does a task in as many processes as there are arguments, at the same time.

  Args:
    task: a function of this module.
    arguments: of each process, fit for JSON.
    imported: whether the clock begins when all have imported what they need, or else when they are
      started.

  Returns:
    What each answered, and the clock seconds until all had.

  Raises:
    RuntimeError: a process ended without an answer.
  """
  began = time.perf_counter()
  with contextlib.ExitStack() as stack:
    processes = []
    for one in arguments:
      process = stack.enter_context(
        subprocess.Popen(
          [sys.executable, "-m", __name__, task, json.dumps(one)],
          env=startup.environment(),
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          text=True,
        )
      )
      stack.callback(process.kill)
      processes.append(process)
    if imported:
      for process in processes:
        _line(process)
      began = time.perf_counter()
    for process in processes:
      assert process.stdin is not None
      process.stdin.write("\n")
      process.stdin.flush()
    if not imported:
      for process in processes:
        _line(process)
    found = [json.loads(_line(process)) for process in processes]
    return found, time.perf_counter() - began


def _line(process: subprocess.Popen[str]) -> str:
  assert process.stdout is not None
  line = process.stdout.readline()
  if not line:
    raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
  return line


def first_batch(**loader: Any) -> dict[str, float]:
  """Opens a loader and takes a batch; CPU seconds from the start of the process."""
  next(input_data.open_loader(**loader))  # not closed: what is under way would delay the answer
  return {"cpu_s": time.process_time()}


def one_pass(rows: tuple[int, int], **loader: Any) -> dict[str, float]:
  """The rows of a host, in all batches of a pass."""
  watch = Stopwatch()
  opened = input_data.open_loader(rows=slice(*rows), passes=1, **loader)
  images = sum(len(batch["image"]) for batch in opened)
  return {"cpu_s": watch.read()[0], "images": images, "resident_mib": resident_mib()[0]}


def many_steps(steps: int, **loader: Any) -> dict[str, float]:
  """The memory of this process after so many batches of an endless stream."""
  opened = input_data.open_loader(**loader)
  for _ in range(steps):
    next(opened)
  return {"resident_mib": resident_mib()[0]}


def resume(position: int, copies: int, **loader: Any) -> dict[str, float]:
  """Opens a loader, restores a state at a position and takes a batch.

  Args:
    position: in the global stream.
    copies: how often each shard and its index, in memory once, stands in the list of shards.
    **loader: of `input_data.open_loader`.
  """
  load = shards.load_indexes
  shards.load_indexes = lambda paths, progress=None: load(paths, progress) * copies
  watch = Stopwatch()
  opened = input_data.open_loader(**loader)
  opened.restore({**opened.state(), "position": position})
  batch = next(opened)
  cpu, clock = watch.read()
  if batch["index"][0] != position or not batch["valid"].all() or opened.epochs[0] > 1:
    raise RuntimeError(f"{opened.num_examples} records, batch {batch['index']}: not at {position}")
  return {"cpu_s": cpu, "clock_s": clock, "resident_mib": resident_mib()[0]}


_TASKS: dict[str, Callable[..., dict[str, float]]] = {
  task.__name__: task for task in (first_batch, one_pass, many_steps, resume)
}


def main(task: str, arguments: str) -> None:
  print("ready", flush=True)
  sys.stdin.readline()
  print(json.dumps(_TASKS[task](**json.loads(arguments))), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
