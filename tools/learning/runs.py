"""Trainings of both sides, kept in a folder; a training that exists is not repeated."""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Literal

from ov_convert import client_env
from tools.learning import batches as batches_lib
from tools.learning import ours
from tools.learning.recipes import Recipe
from tools.learning.trained import Trained

SCRIPT = Path(__file__).with_name("clients") / "train_torch.py"
Side = Literal["ours", "hand", "torch", "torch64"]


@dataclasses.dataclass(frozen=True)
class Runs:
  """The trainings in a folder.

  Attributes:
    folder: folder of batches, exported initial weights and results.
    say: function that prints a progress line.
  """

  folder: Path
  say: Callable[[str], None] = lambda _: None

  def get(self, recipe: Recipe, side: Side, order: int = 0, stop: int | None = None) -> Trained:
    """Return a training, from its file if that exists.

    Args:
      recipe: settings.
      side: "ours", the trainer; "hand", our gradients with an AdamW in numpy; "torch"; "torch64",
        in float64.
      order: summation order of the rows. "torch" also uses other kernels in order 1.
      stop: number of steps, if less than the recipe's.

    Raises:
      ov_convert.client_env.ClientError: if PyTorch fails.
    """
    part = "" if stop is None else f"-first{stop}"
    path = self.folder / recipe.folder / f"{side}-{order}{part}.npz"
    if not path.exists():
      self.say(f"{recipe.name} {side} {order}{part}")
      path.parent.mkdir(parents=True, exist_ok=True)
      batches = batches_lib.write(self.folder / "batches")
      if side.startswith("torch"):
        self._train_torch(recipe, side, order, stop, batches, path)
      else:
        training = ours.prepare(recipe, batches, recipe.processes)
        train = ours.train if side == "ours" else ours.train_by_hand
        train(training, batches, order, stop).save(path)
    return Trained.load(path)

  def _train_torch(
    self,
    recipe: Recipe,
    side: Side,
    order: int,
    stop: int | None,
    batches: batches_lib.Batches,
    path: Path,
  ) -> None:
    """Export the initial weights, train them in PyTorch, and save the result with our names."""
    training = ours.prepare(recipe, batches, recipe.processes)
    model, unfinished = path.parent / "model", path.with_name(f"raw-{path.name}")
    shutil.rmtree(model, ignore_errors=True)
    ours.export(training, batches, model)
    settings = recipe.to_dict() | {
      "model": str(model),
      "batches": str(batches.folder),
      "order": order,
      "stop": stop,
      "kernels": "plain" if order == 1 else "default",
      "dtype": "float64" if side == "torch64" else "float32",
      "pad_id": batches.tokenizer().pad_id,
      "out": str(unfinished),
    }
    file = path.with_suffix(".json")
    file.write_text(json.dumps(settings, indent=1), "utf-8")
    client_env.run_client(SCRIPT, [file], timeout=7200)
    ours.our_names(training, Trained.load(unfinished)).save(path)
    unfinished.unlink()
