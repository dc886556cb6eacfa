"""Trainings that are repeated in PyTorch, with every setting that both sides share."""

import dataclasses
import hashlib
import json
from typing import Any, Literal

Library = Literal["open_clip", "twin", "timm"]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One training of a small model; both sides read all numbers from here.

  Betas, epsilon and weight decay are those of open_clip for ViTs, or of timm for the classifier.

  Attributes:
    name: name in tables and file names.
    about: title of the chart.
    library: the PyTorch model: of open_clip, our exported module ("twin"), or of timm.
    loss: "clip", "siglip", "caption" or "classify".
    processes: processes of the PyTorch side, and devices of ours.
    steps, batch_size: length of the training.
    learning_rate, warmup_steps: peak of the cosine schedule, and its linear warm-up from 0.
    b1, b2, eps, weight_decay: settings of AdamW.
    decay_regex: our parameters with weight decay.
    grad_clip_norm: maximum norm of the gradient; None disables clipping.
    max_scale: upper limit of the inverse temperature.
    label_smoothing: of the classifier.
    mu_dtype: dtype of our first moment.
    first_warmup_step: 0 as in our schedules, 1 as in `open_clip_train.scheduler`.
  """

  name: str
  about: str
  library: Library
  loss: Literal["clip", "siglip", "caption", "classify"]
  processes: int = 1
  steps: int = 300
  batch_size: int = 32
  learning_rate: float = 1e-3
  warmup_steps: int = 30
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-6
  weight_decay: float = 0.2
  decay_regex: str = r"(^|/)(kernel|embedding|position_embedding)$"
  grad_clip_norm: float | None = None
  max_scale: float | None = 100.0
  label_smoothing: float = 0.0
  mu_dtype: Literal["float32", "bfloat16"] = "float32"
  first_warmup_step: int = 0

  def to_dict(self) -> dict[str, Any]:
    """Return the fields."""
    return dataclasses.asdict(self)

  @property
  def folder(self) -> str:
    """Return the name and a hash of the settings, so that changed settings never reuse a run."""
    content = json.dumps(self.to_dict(), sort_keys=True).encode()
    return f"{self.name}-{hashlib.sha256(content).hexdigest()[:10]}"


RECIPES = {
  recipe.name: recipe
  for recipe in (
    Recipe("clip", "CLIP", "open_clip", "clip"),
    Recipe("siglip", "SigLIP", "open_clip", "siglip", grad_clip_norm=1.0),
    Recipe(
      "siglip-2", "SigLIP on 2 processes", "open_clip", "siglip", processes=2, grad_clip_norm=1.0
    ),
    Recipe("caption", "Captioning", "twin", "caption", grad_clip_norm=1.0, max_scale=None),
    Recipe(
      "classifier", "ViT classifier", "timm", "classify", b2=0.999, eps=1e-8, weight_decay=0.05,
      decay_regex=r"(^|/)kernel$", grad_clip_norm=1.0, max_scale=None, label_smoothing=0.1,
    ),
  )
}  # fmt: skip

SHORT = 30  # steps of trainings with a planted difference, or in float64


@dataclasses.dataclass(frozen=True)
class Planted:
  """A setting that is changed on one side, to show that the comparison finds it.

  Attributes:
    changes: fields of the recipe.
    torch: whether PyTorch gets them instead of the trainer.
  """

  changes: dict[str, Any]
  torch: bool = False


# The first two are errors; the others are defaults of the trainer or of open_clip.
PLANTED = {
  "weight decay doubled": Planted({"weight_decay": 0.4}),
  "eps 1e-8": Planted({"eps": 1e-8}),
  "decay of kernels only": Planted({"decay_regex": r"(^|/)kernel$"}),
  "first moment in bfloat16": Planted({"mu_dtype": "bfloat16"}),
  "warm-up counted from 1": Planted({"first_warmup_step": 1}, torch=True),
}
