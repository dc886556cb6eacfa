"""Result of one training: metrics of every step, final weights, and outputs for held-out data."""

import dataclasses
from pathlib import Path
from typing import Self

import numpy as np

Arrays = dict[str, np.ndarray]
CURVES = ("loss", "grad_norm", "scale")


@dataclasses.dataclass(frozen=True)
class Trained:
  """One training.

  Attributes:
    curves: float64 [steps] by name: the loss and the gradient norm before clipping, and for
      contrastive losses the factor of the similarities, all at the parameters before the update.
    weights: final parameters by the paths of ov_models.
    outputs: outputs for held-out data: unit vectors `image` and `text`, `nll`, or `logits`.
  """

  curves: Arrays
  weights: Arrays
  outputs: Arrays

  def save(self, path: Path) -> None:
    """Write the file; it appears under its name only when it is complete."""
    groups = dataclasses.asdict(self).items()
    flat = {f"{group}:{name}": value for group, arrays in groups for name, value in arrays.items()}
    unfinished = path.with_name(f"unfinished-{path.name}")
    np.savez(unfinished, **flat)
    unfinished.rename(path)

  @classmethod
  def load(cls, path: Path) -> Self:
    """Read a file of `save`, or of the PyTorch script."""
    groups: dict[str, Arrays] = {field.name: {} for field in dataclasses.fields(cls)}
    with np.load(path, allow_pickle=False) as file:
      for key in file.files:
        group, _, name = key.partition(":")
        groups[group][name] = file[key]
    return cls(**groups)
