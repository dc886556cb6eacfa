"""The trainer and PyTorch take the same first steps, and a planted difference is found.

Trainings have six steps, with a warm-up of two: the first rate is 0, the third the peak. The first
five updates change the loss of the last step, whose difference is compared.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tools.learning import batches, comparison, ours
from tools.learning.recipes import RECIPES, Recipe
from tools.learning.runs import Runs

STEPS = 6
# A loss of 32 rows sums about a thousand float32 terms; the largest difference of these trainings,
# on the machine where they were written, is 2e-7 for losses and 2e-6 for norms.
LOSS, NORM, WEIGHTS = 2e-6, 2e-5, 1e-5


def short(name: str, **changes) -> Recipe:
  return dataclasses.replace(RECIPES[name], steps=STEPS, warmup_steps=2, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
  return Runs(tmp_path_factory.mktemp("learning"))


def farthest(pair: comparison.Pair, curve: str) -> float:
  return float(comparison.distances(pair, curve).max())


@pytest.mark.parametrize("name", ["clip", "siglip-2", "caption", "classifier"])
def test_first_steps_agree_with_pytorch(name, runs: Runs):
  # A limit of 10 clips the temperature from the first step on.
  recipe = short(name, max_scale=10.0) if name == "clip" else short(name)
  pair = runs.get(recipe, "ours"), runs.get(recipe, "torch")
  assert len(pair[0].curves["loss"]) == len(pair[1].curves["loss"]) == STEPS
  assert farthest(pair, "loss") < LOSS
  assert farthest(pair, "grad_norm") < NORM
  assert pair[0].weights.keys() == pair[1].weights.keys()
  assert comparison.weight_distance(pair) < WEIGHTS
  if name == "clip":
    assert pair[0].curves["scale"][1] == pytest.approx(10.0, rel=1e-6)
    assert farthest(pair, "scale") < LOSS
  for output, value in pair[0].outputs.items():
    np.testing.assert_allclose(value, pair[1].outputs[output], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  "changes", [{"weight_decay": 0.1}, {"eps": 1e-6}, {"grad_clip_norm": None}], ids=str
)
def test_a_planted_difference_is_found(changes, runs: Runs):
  recipe = short("classifier")
  changed = runs.get(dataclasses.replace(recipe, **changes), "ours")
  pair = changed, runs.get(recipe, "torch")
  assert comparison.weight_distance(pair) > 10 * WEIGHTS or farthest(pair, "loss") > 10 * LOSS


def test_an_existing_training_is_not_repeated(runs: Runs, monkeypatch):
  recipe = short("classifier")
  first = runs.get(recipe, "ours")
  monkeypatch.setattr(ours, "train", None)
  again = runs.get(recipe, "ours")
  np.testing.assert_array_equal(first.curves["loss"], again.curves["loss"])
  with pytest.raises(TypeError, match="not callable"):
    runs.get(dataclasses.replace(recipe, eps=1e-3), "ours")


def test_batches_are_the_same_on_every_call(tmp_path: Path):
  first, again = batches.write(tmp_path / "a"), batches.write(tmp_path / "b")
  for name in ("image", "text", "caption", "label", "rows", "held_out_text"):
    np.testing.assert_array_equal(first.array(name), again.array(name))
  rows = [first.rows(3, 32, order) for order in (0, 1)]
  assert (rows[0] != rows[1]).any()
  np.testing.assert_array_equal(np.sort(rows[0]), np.sort(rows[1]))
