"""Benchmark of checkpoints: time that saving blocks the loop, time to save, and time to restore.

The train state has the recipe's optimizer and random values, which compress as little as trained
ones. Checkpoints are written as in the training loop. Restoring reads a recent checkpoint from the
page cache.
"""

from collections.abc import Callable, Mapping
import functools
import itertools
from pathlib import Path

import jax
import numpy as np

from apps.trainer.checkpoint import Checkpoints, find_checkpoint
from apps.trainer.run_config import RunConfig
from tools.bench.compiling import load_config, plan_of
from tools.bench.harness import Benchmark, Case, Stopwatch, measured, timed

SIZES = ("Ti", "S")
MODEL = "img={0}/16,txt_decoder_name={0},res=160,batch_size=32"


def make(scratch: Path) -> Benchmark:
  """Return the cases. `scratch` is the folder of the checkpoints."""
  cases: list[Case] = []
  for size in SIZES:
    saved = functools.cache(functools.partial(_saved, size, scratch / size))
    for name in ("save", "restore"):
      cases.append(Case(f"{name}/{size}", functools.partial(_run, saved, name)))
  return Benchmark(
    "checkpoint",
    f"The train state of `apps/configs/openvision2.py:{MODEL.format(SIZES[0])}`, and of "
    f"{' and '.join(SIZES[1:])} in place of {SIZES[0]}: saved to a folder on a local disk, and "
    "restored from the page cache, by apps/trainer/checkpoint.py. The loop resumes after the "
    "seconds of the first column; the others count until everything is on the disk.",
    cases,
  )


def _run(saved: "Callable[[], Saved]", name: str) -> dict[str, float]:
  return saved().save() if name == "save" else saved().restore()


def _saved(size: str, folder: Path) -> "Saved":
  return Saved(load_config("openvision2.py", MODEL.format(size)), folder)


class Saved:
  """A train state and its checkpoints."""

  def __init__(self, config: RunConfig, folder: Path):
    """Create the state.

    Args:
      config: settings of one stage.
      folder: folder of the checkpoints, which is created.
    """
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
      values = np.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
      return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    self._abstract = plan_of(config).parts.abstract
    self._state = jax.tree.map(fill, self._abstract)
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
    self._metadata = {"config": config.to_dict()}
    self._folder = folder
    self._steps = itertools.count(1)

  def save(self) -> dict[str, float]:
    """Save and wait until the checkpoint is complete; `blocked_s` is the time the loop waits."""
    with Checkpoints(self._folder) as checkpoints:
      blocked, metrics = timed(lambda: self._save(checkpoints))
    files = [file for file in Path(find_checkpoint(self._folder)).rglob("*") if file.is_file()]
    sizes = {
      "file_mib": sum(file.stat().st_size for file in files) / 2**20,
      "state_mib": self._bytes / 2**20,
    }
    return metrics | sizes | self._rate(metrics) | {"blocked_s": blocked}

  def restore(self) -> dict[str, float]:
    """Restore and wait until all arrays are on the devices.

    Raises:
      RuntimeError: if any bit differs from the saved state.
    """
    if not self._folder.exists():  # --only excluded the case that saves
      self.save()
    with Checkpoints(self._folder) as checkpoints:
      read = lambda: checkpoints.restore(self._abstract).state
      state, metrics = measured(lambda: jax.block_until_ready(read()))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(self._state), strict=True):
      if np.asarray(one).tobytes() != np.asarray(other).tobytes():
        raise RuntimeError("the restored state is not the saved one; expected every bit")
    return metrics | self._rate(metrics)

  def _rate(self, metrics: Mapping[str, float]) -> dict[str, float]:
    return {"mb_per_s": self._bytes / 1e6 / metrics["clock_s"]}

  def _save(self, checkpoints: Checkpoints) -> float:
    watch = Stopwatch()
    checkpoints.save(next(self._steps), self._state, self._metadata)
    _, blocked = watch.read()
    checkpoints.wait()
    return blocked
