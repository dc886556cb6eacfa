"""Run ONNX graphs before and after a conversion of their weights on the same inputs.

  python compare_onnx.py BEFORE AFTER PROBE OUTPUT.npz

PROBE is described in client_io. OUTPUT contains `image/before`, `image/after` [B, E], `text/before`
and `text/after` [N, E]: embeddings, or pooled vectors of graphs without one. The fact `speed` has
the median of the time before, divided by the time after, of each tower on the CPU.
"""

import pathlib
import statistics
import sys
import time
from typing import Any

import client_io
import numpy as np
import onnxruntime

_BATCH = 8
_TRIALS = 3  # timed rounds over all batches


def main() -> None:
  """Run the existing towers."""
  before, after = map(pathlib.Path, sys.argv[1:3])
  probe = client_io.Probe(sys.argv[3])
  inputs = {"image": np.ascontiguousarray(probe.pixels.transpose(0, 3, 1, 2)), "text": probe.ids}
  arrays: dict[str, Any] = {}
  speed = {}
  for tower, given in inputs.items():
    if given is not None and (before / f"{tower}.onnx").exists():
      runs = [Graph(folder / f"{tower}.onnx") for folder in (before, after)]
      arrays |= {f"{tower}/{n}": g(given) for n, g in zip(("before", "after"), runs)}
      speed[tower] = ratio(runs, given)
  client_io.write(sys.argv[4], arrays, {"speed": speed}, ["onnxruntime"])


class Graph:
  """The first of the outputs `embedding`, `pooled` and the only one of a graph."""

  def __init__(self, file: pathlib.Path) -> None:
    self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in self.session.get_outputs()]
    self.output = next((name for name in ("embedding", "pooled") if name in names), names[0])
    self.input = self.session.get_inputs()[0].name

  def __call__(self, given: np.ndarray) -> np.ndarray:
    parts = [given[start : start + _BATCH] for start in range(0, len(given), _BATCH)]
    return np.concatenate([self.session.run([self.output], {self.input: p})[0] for p in parts])


def ratio(graphs: list[Graph], given: np.ndarray) -> float:
  """Return the median time of the first graph, relative to the second; runs alternate."""
  seconds: list[list[float]] = [[], []]
  for _ in range(_TRIALS):
    for graph, times in zip(graphs, seconds):
      start = time.perf_counter()
      graph(given[: 2 * _BATCH])
      times.append(time.perf_counter() - start)
  return statistics.median(seconds[0]) / statistics.median(seconds[1])


if __name__ == "__main__":
  main()
