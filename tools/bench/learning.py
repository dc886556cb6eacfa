"""Benchmark of learning: trainings of this repository and of PyTorch on the same batches.

Both sides start from the same weights and read the same rows in the same order. Each side is
repeated in another summation order, so that a difference between the sides can be compared with the
difference that float32 sums alone make. Trainings are kept in a folder and never repeated.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from tools.bench.harness import Benchmark, Case, Goal
from tools.learning import batches, comparison, figures
from tools.learning.comparison import Pair
from tools.learning.recipes import PLANTED, RECIPES, SHORT, Planted, Recipe
from tools.learning.runs import Runs, Side
from tools.learning.trained import Trained

EARLY_GOAL = 1e-6  # loss of the first steps: rounding of float32
FOUND = 10  # a difference is real if it exceeds the noise band this many times
_PLANTED_IN = "clip"
_BY_HAND = ("clip", "classifier")
_FLOAT64 = ("clip", "caption", "classifier")
_DEVICES = 2


def make(folder: Path) -> Benchmark:
  """Return the comparisons as cases. `folder` keeps the trainings.

  Raises:
    ValueError: if jax has been started with a single device.
  """
  jax.config.update("jax_num_cpu_devices", _DEVICES)
  if jax.device_count() < _DEVICES:
    raise ValueError(
      f"learning trains on {_DEVICES} devices, and jax has {jax.device_count()}; run it on a CPU"
    )
  table = _Table(Runs(folder.absolute()))
  cases, goals = [], []
  for recipe in RECIPES.values():
    rows = {
      "OpenVision, other order": table.ours,
      "PyTorch, other order": table.torch,
      "OpenVision and PyTorch": table.both,
    }
    if recipe.name in _FLOAT64:
      rows |= {
        "OpenVision and float64": table.ours_and_float64,
        "PyTorch and float64": table.torch_and_float64,
      }
    if recipe.name in _BY_HAND:
      rows["AdamW by hand and PyTorch"] = table.by_hand
      goals.append(Goal(f"{recipe.name}: AdamW by hand and PyTorch", "bands", FOUND))
    for name, run in rows.items():
      row = f"{recipe.name}: {name}"
      cases.append(Case(row, functools.partial(run, recipe), warm_up=False))
    both = f"{recipe.name}: OpenVision and PyTorch"
    goals += [Goal(both, "loss_early", EARLY_GOAL), Goal(both, "bands", FOUND)]
  for name, planted in PLANTED.items():
    run = functools.partial(table.planted, RECIPES[_PLANTED_IN], planted)
    row = f"{_PLANTED_IN}, planted: {name}"
    cases.append(Case(row, run, warm_up=False))
    goals.append(Goal(row, "bands", FOUND, at_least=True))
  recipe = RECIPES[_PLANTED_IN]
  return Benchmark(
    "learning",
    f"Largest relative differences of trainings of {recipe.steps} steps from the same weights on "
    "the same batches. `early` are the first "
    f"{comparison.EARLY} steps, `late` the last {comparison.LATE}. `noise bands` is the largest "
    "difference so far, relative to the largest difference so far between two summation orders of "
    f"one side. Planted differences and float64 are trained for {SHORT} steps.",
    cases,
    goals=goals,
    dtype="float32",
    batch=recipe.batch_size,
    exact=True,
  )


def draw(benchmark: Benchmark, runs: Path, folder: Path) -> list[Path]:
  """Write the charts of the recipes of a benchmark from its trainings, and return the files."""
  table, files = _Table(Runs(runs.absolute())), []
  names = {case.name.partition(":")[0] for case in benchmark.cases}
  for recipe in (RECIPES[name] for name in RECIPES if name in names):
    title = f"{recipe.about}: {recipe.steps} steps of AdamW in float32, batch {recipe.batch_size}"
    image = figures.render(title, table.of(recipe, "ours"), table.of(recipe, "torch"))
    files.append(folder / f"learning-{recipe.name}.svg")
    files[-1].write_text(image, "utf-8")
  return files


@dataclasses.dataclass(frozen=True)
class _Table:
  """Rows of the table as functions of a recipe."""

  runs: Runs

  def of(self, recipe: Recipe, side: Side) -> list[Trained]:
    """Return the trainings of a side in both orders."""
    return [self.runs.get(recipe, side, order) for order in (0, 1)]

  def ours(self, recipe: Recipe) -> dict[str, float]:
    first, second = self.of(recipe, "ours")
    return comparison.summary([(first, second)])

  def torch(self, recipe: Recipe) -> dict[str, float]:
    first, second = self.of(recipe, "torch")
    return comparison.summary([(first, second)])

  def both(self, recipe: Recipe) -> dict[str, float]:
    ours, torch = self.of(recipe, "ours"), self.of(recipe, "torch")
    pairs = comparison.across(ours, torch)
    labels = batches.write(self.runs.folder / "batches").array("held_out_label")
    values = {"bands": self._bands(recipe, pairs)}
    values["held_out_ours"] = comparison.held_out(ours[0], labels)
    values["held_out_torch"] = comparison.held_out(torch[0], labels)
    return comparison.summary(pairs) | values

  def ours_and_float64(self, recipe: Recipe) -> dict[str, float]:
    return self._from_float64(recipe, "ours")

  def torch_and_float64(self, recipe: Recipe) -> dict[str, float]:
    return self._from_float64(recipe, "torch")

  def _from_float64(self, recipe: Recipe, side: Side) -> dict[str, float]:
    """Return the differences of the first steps from PyTorch in float64."""
    exact = self.runs.get(recipe, "torch64", 0, SHORT)
    found = comparison.summary(comparison.across(self.of(recipe, side), [exact]))
    return {name: found[name] for name in ("loss_early", "grad_early")}

  def by_hand(self, recipe: Recipe) -> dict[str, float]:
    pairs = comparison.across([self.runs.get(recipe, "hand")], self.of(recipe, "torch"))
    return comparison.summary(pairs) | {"bands": self._bands(recipe, pairs)}

  def planted(self, recipe: Recipe, planted: Planted) -> dict[str, float]:
    changed = dataclasses.replace(recipe, **planted.changes)
    side: Side = "torch" if planted.torch else "ours"
    other: Side = "ours" if planted.torch else "torch"
    pairs = [(self.runs.get(changed, side, 0, SHORT), self.runs.get(recipe, other))]
    multiple = comparison.excess(pairs, self._band(recipe))
    found = {"loss_early": float(comparison.distances(pairs[0], "loss")[: comparison.EARLY].max())}
    found["bands"] = float(multiple.max())
    step = comparison.first_above(multiple, FOUND)
    return found if step is None else found | {"found_at": step}

  def _band(self, recipe: Recipe) -> np.ndarray:
    ours, torch = self.of(recipe, "ours"), self.of(recipe, "torch")
    same: list[Pair] = [(ours[0], ours[1]), (torch[0], torch[1])]
    return comparison.noise_band(same)

  def _bands(self, recipe: Recipe, pairs: list[Pair]) -> float:
    return float(comparison.excess(pairs, self._band(recipe)).max())
