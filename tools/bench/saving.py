"""The cases of `checkpoint`: one train state, saved and restored in several ways."""

from collections.abc import Callable, Mapping
import itertools
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import safetensors.numpy

from apps.trainer.checkpoint import Checkpoints, find_checkpoint
from apps.trainer.paths import flatten_paths
from tools.bench.checkpointing import OURS
from tools.bench.compiling import plan_of
from tools.bench.harness import Stopwatch, measured, timed

Arrays = Mapping[str, np.ndarray]


def _write_npz(path: Path, arrays: Arrays) -> None:
  with path.open("wb") as file:
    np.savez(file, allow_pickle=False, **dict(arrays))


def _read_npz(path: Path) -> Arrays:
  with np.load(path) as file:
    return dict(file)


# Ways to write one file of arrays, and to read it.
FILES: dict[str, tuple[Callable[[Path, Arrays], None], Callable[[Path], Arrays]]] = {
  "npz": (_write_npz, _read_npz),
  "safetensors": (
    lambda path, arrays: safetensors.numpy.save_file(dict(arrays), path),
    safetensors.numpy.load_file,
  ),
}


class Saved:
  """A train state, and a folder with what is saved of it."""

  def __init__(self, config: ConfigDict, folder: Path):
    """Makes the state.

    Args:
      config: of one stage.
      folder: for all that is saved; it is made.
    """
    parts = plan_of(config, "cpu").parts
    rng = np.random.default_rng(0)
    folder.mkdir()

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
      values = np.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
      return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    self._abstract = parts.abstract
    self._state = jax.tree.map(fill, self._abstract)
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
    self._metadata = {"config": config.to_dict()}
    self._folder = folder
    self._steps = itertools.count(1)

  def save(self, form: str) -> dict[str, float]:
    """Until the disk has it; `blocked_s` is how long the caller waits."""
    if form == OURS:
      with Checkpoints(self._path(form)) as checkpoints:
        blocked, figures = timed(lambda: self._save(checkpoints))
    else:
      blocked, figures = timed(lambda: self._save_file(form))
    sizes = {"file_mib": self._saved_bytes(form) / 2**20, "state_mib": self._bytes / 2**20}
    return figures | sizes | self._rate(figures) | {"blocked_s": blocked}

  def restore(self, form: str) -> dict[str, float]:
    """Until the devices have it."""
    if not self._path(form).exists():  # only this case was asked for
      self.save(form)
    if form == OURS:
      with Checkpoints(self._path(form)) as checkpoints:
        read = lambda: checkpoints.restore(self._abstract).state
        state, figures = measured(lambda: jax.block_until_ready(read()))
    else:
      state, figures = measured(lambda: jax.block_until_ready(self._read_file(form)))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(self._state), strict=True):
      if np.asarray(one).tobytes() != np.asarray(other).tobytes():
        raise RuntimeError(f"{form} gave back another state than was saved; expected every bit")
    return figures | self._rate(figures)

  def _rate(self, figures: Mapping[str, float]) -> dict[str, float]:
    return {"mb_per_s": self._bytes / 1e6 / figures["clock_s"]}

  def _save(self, checkpoints: Checkpoints) -> float:
    watch = Stopwatch()
    checkpoints.save(next(self._steps), self._state, self._metadata)
    _, blocked = watch.read()
    checkpoints.wait()
    return blocked

  def _save_file(self, form: str) -> float:
    watch = Stopwatch()
    path = self._path(form)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_paths(self._state).items()}
    FILES[form][0](path.with_suffix(".part"), arrays)
    with path.with_suffix(".part").open("rb") as file:
      os.fsync(file.fileno())
    path.with_suffix(".part").replace(path)
    return watch.read()[1]

  def _read_file(self, form: str) -> Any:
    arrays = FILES[form][1](self._path(form))
    leaves = flatten_paths(self._abstract)
    # numpy's files do not know bfloat16: it comes back as bytes.
    placed = [
      jax.device_put(arrays[name].view(leaf.dtype), leaf.sharding) for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(self._abstract), placed)

  def _saved_bytes(self, form: str) -> int:
    """Of the newest state that was saved."""
    path = self._path(form)
    if form == OURS:
      path = Path(find_checkpoint(path))
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

  def _path(self, form: str) -> Path:
    return self._folder / f"state.{form}"
