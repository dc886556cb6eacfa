"""What a loss and its gradient cost: in tiles and blocks, and with all logits at once.

The caption loss by width of the decoder, the contrastive losses on one device; and on eight
simulated ones, in a process of its own, for a process has the devices it began with:

  python -m tools.bench.losses ring
"""

from collections.abc import Callable, Mapping
import functools
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from tools.bench import startup
from tools.bench.harness import Benchmark, Case, Ratio, Stopwatch

MIB = 2**20
CAPTIONS, TOKENS, WORDS = 32, 80, 32_000
WIDTHS = (192, 384, 768)  # of the decoders Ti, S and L
PAIRS, EMBEDDING = 4096, 512
DEVICES = 8


def make(scratch: Path) -> Benchmark:
  """The cases; nothing is made before they run."""
  del scratch
  cases, ratios = [], []

  def compare(name: str, runs: Mapping[str, Callable[[], Mapping[str, float]]]) -> None:
    for form, run in runs.items():
      cases.append(Case(f"{name}, {form}", run))
      if form != "naive":
        ratios.append(Ratio(f"{name}, {form}", f"{name}, naive"))

  for width in WIDTHS:
    forms = {form: _Loss(functools.partial(_caption, form, width)) for form in ("naive", "tiled")}
    compare(f"caption/width {width}", forms)
  for kind in ("softmax", "sigmoid"):
    forms = {
      form: _Loss(functools.partial(_contrastive, kind, form, 1)) for form in ("naive", "gathered")
    }
    compare(kind, forms)
  compare(
    f"softmax/{DEVICES} devices",
    {form: functools.partial(_on_devices, form) for form in ("naive", "gathered", "ring")},
  )
  return Benchmark(
    "loss",
    f"Value and gradient of a loss: of {CAPTIONS} captions of {TOKENS} tokens over {WORDS:,} "
    f"words; between {PAIRS:,} pictures and {PAIRS:,} texts of {EMBEDDING} numbers, on one device "
    f"and on {DEVICES} simulated ones, of which the temporaries are those of one and the seconds "
    "of all.",
    cases,
    ratios=ratios,
    dtype="float32",
  )


class _Loss:
  """A loss, compiled with its arguments when it first runs."""

  def __init__(self, make: Callable[[], tuple[Any, tuple[Any, ...]]]):
    """`make` returns the jitted value and gradient, and arguments."""
    self._make = make

  @functools.cached_property
  def _ready(self) -> tuple[Any, tuple[Any, ...]]:
    import jax

    function, arguments = self._make()
    arguments = jax.device_put(arguments)
    return function.lower(*arguments).compile(), arguments

  def __call__(self) -> Mapping[str, float]:
    import jax

    compiled, arguments = self._ready
    watch = Stopwatch()
    jax.block_until_ready(compiled(*arguments))
    cpu, clock = watch.read()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"cpu_s": cpu, "clock_s": clock, "temporary_mib": temporaries / MIB}


def _caption(form: str, width: int) -> tuple[Any, tuple[Any, ...]]:
  """The caption loss and its arguments; a fifth of the tokens are no targets."""
  import numpy as np

  from ov_losses import memory_report

  draw = np.random.default_rng(0)
  arguments = (
    draw.normal(size=(CAPTIONS, TOKENS, width)).astype(np.float32),
    draw.normal(0, 0.02, (width, WORDS)).astype(np.float32),
    draw.integers(0, WORDS, (CAPTIONS, TOKENS), np.int32),
    draw.random((CAPTIONS, TOKENS)) < 0.8,
  )
  return memory_report.value_and_gradients(form), arguments


def _contrastive(kind: Any, form: Any, devices: int) -> tuple[Any, tuple[Any, ...]]:
  """A contrastive loss and its arguments; a fifth of the pairs are not valid."""
  import jax

  from ov_losses import contrastive_report, contrastive_truth

  mesh = contrastive_report.make_mesh(jax.devices()[:devices])
  arguments = contrastive_truth.example(PAIRS, 1, EMBEDDING)
  return contrastive_report.value_and_gradients(kind, form, mesh), tuple(arguments)


def _on_devices(form: str) -> Mapping[str, float]:
  """The softmax loss in a process with many devices."""
  done = subprocess.run(
    [sys.executable, "-m", __name__, form],
    env=startup.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f"the process of {form} ended with {done.returncode}: {done.stderr[-2000:]}")
  return json.loads(done.stdout)


def main(form: str) -> None:
  """Runs the loss twice, of which the second counts; prints what it cost, as JSON."""
  import jax

  jax.config.update("jax_num_cpu_devices", DEVICES)
  loss = _Loss(functools.partial(_contrastive, "softmax", form, DEVICES))
  loss()
  print(json.dumps(loss()))


if __name__ == "__main__":
  main(sys.argv[1])
