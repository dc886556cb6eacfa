"""What checkpoints cost: saving, as long as the loop waits and until it is complete; restoring.

The state is that of a run with the recipe's optimizer, full of random numbers, which compress as
little as trained ones do. Ours are made as the training loop makes them; the naive ones are one
file of the same arrays, numpy's or safetensors'. All are on the disk before the clock stops. What
is restored was written just before, and comes out of the system's cache.
"""

from collections.abc import Callable
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.compiling import load_config
from tools.bench.harness import Benchmark, Case, Ratio

if TYPE_CHECKING:
  from tools.bench.saving import Saved

SIZES = ("Ti", "S")
MODEL = "img={0}/16,txt_decoder_name={0},res=160,batch_size=32"
OURS, FILES = "ours", ("npz", "safetensors")


def make(scratch: Path) -> Benchmark:
  """The cases; checkpoints are written into `scratch`."""
  cases: list[Case] = []
  ratios: list[Ratio] = []
  for size in SIZES:
    saved = functools.cache(functools.partial(_saved, size, scratch / size))
    for what in ("save", "restore"):
      for form in (OURS, *FILES):
        cases.append(Case(f"{what}/{size}, {form}", functools.partial(_run, saved, what, form)))
      ratios += [Ratio(f"{what}/{size}, {OURS}", f"{what}/{size}, {form}") for form in FILES]
  return Benchmark(
    "checkpoint",
    f"The train state of `apps/configs/openvision2.py:{MODEL.format(SIZES[0])}`, and of "
    f"{' and '.join(SIZES[1:])} in place of {SIZES[0]}: into a folder on a disk of this machine, "
    f"and back out of the system's cache. `{OURS}` is apps/trainer/checkpoint.py; the others are "
    "one file of the same arrays, with fsync. The loop goes on after the seconds of the first "
    "column; the others count until all is on the disk.",
    cases,
    ratios=ratios,
  )


def _run(saved: Callable[[], "Saved"], what: str, form: str) -> dict[str, float]:
  return saved().save(form) if what == "save" else saved().restore(form)


def _saved(size: str, folder: Path) -> "Saved":
  """Made when the first case needs it, for it imports jax."""
  from tools.bench import saving

  return saving.Saved(load_config("openvision2.py", MODEL.format(size)), folder)
