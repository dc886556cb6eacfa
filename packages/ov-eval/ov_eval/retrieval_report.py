"""What retrieval costs in time and memory, on embeddings made up for it.

    python -m ov_eval.retrieval_report [--images 20000] [--texts 100000] [--width 512] [--share 1]

CPU-seconds are the figure to compare on a machine that others use. `--share` stops after that
share of the scores; memory has reached its peak long before.
"""

import argparse
import os
from pathlib import Path
import sys
import threading
import time

import jax
import numpy as np

from ov_eval.retrieval import retrieval

_MIB = 2**20


class _Enough(Exception):
  """The asked share of the scores is done."""


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--images", type=int, default=20_000)
  parser.add_argument("--texts", type=int, default=100_000)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--share", type=float, default=1.0, help="of the scores, 0 to 1")
  options = parser.parse_args(arguments)
  images, texts, owner = embeddings(options.images, options.texts, options.width)
  retrieval(images[:64], texts[:64], np.arange(64))  # what JAX takes once
  line = measure(images, texts, owner, options.share)
  print(f"{jax.devices()[0].device_kind}, {jax.process_count()} process, float32: {line}")


def embeddings(
  num_images: int, num_texts: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Unit vectors [I, E] and [X, E], and the image of each text, near which the text lies."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((num_images, width), np.float32)
  images /= np.linalg.norm(images, axis=1, keepdims=True)
  owner = rng.integers(0, num_images, num_texts)
  texts = np.empty((num_texts, width), np.float32)
  for start in range(0, num_texts, 4096):
    some = images[owner[start : start + 4096]]
    some = some + 4 / width**0.5 * rng.standard_normal(some.shape, np.float32)
    texts[start : start + 4096] = some / np.linalg.norm(some, axis=1, keepdims=True)
  return images, texts, owner


def measure(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, share: float) -> str:
  """Runs retrieval; the figures as text."""
  done_share, peak, before = 0.0, 0, _resident()
  finished = threading.Event()

  def watch() -> None:
    nonlocal peak
    while not finished.wait(0.01):
      peak = max(peak, _resident())

  def progress(done: int, in_all: int) -> None:
    nonlocal done_share
    done_share = done / in_all
    if done_share >= share:
      raise _Enough

  watcher = threading.Thread(target=watch)
  watcher.start()
  wall, cpu = time.perf_counter(), time.process_time()
  try:
    retrieval(images, texts, owner, progress=progress if share < 1 else None)
  except _Enough:
    pass
  finally:
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finished.set()
    watcher.join()
  return (
    f"{len(images):,} x {len(texts):,} of width {images.shape[1]}, "
    f"{done_share if share < 1 else 1:.0%} of the scores: {wall:.1f} s, {cpu:.1f} CPU-seconds, "
    f"{max(peak - before, 0) / _MIB:,.0f} MiB beside embeddings of "
    f"{(images.nbytes + texts.nbytes) / _MIB:,.0f} MiB; all scores at once would be "
    f"{4 * len(images) * len(texts) / _MIB:,.0f} MiB"
  )


def _resident() -> int:
  """Bytes of memory that this process holds (Linux)."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  main(sys.argv[1:])
