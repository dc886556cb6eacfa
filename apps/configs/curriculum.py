"""Curricula: all stages of a published model as one configuration and one command.

A recipe (openvision.py, openvision2.py) resolves each stage as a separate run. The first stage is
the base configuration; `config.stages` contains the settings in which later stages differ. Batch
size, learning rate, steps and warm-up are therefore the same as in separate runs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments
from apps.trainer.names import leaf_values

# Hyperparameters per stage; extra stages repeat the last. OpenVision published all three stages.
# OpenVision 2 published stages 1 and 2; of stage 3 only the length is known, and its batch size,
# learning rate and warm-up are our choice.
STAGES = (
  {"batch_factor": 2.0, "base_lr": 8e-6, "imagenet_epoch": 10_000.0, "virtual_warmup_epoch": 40.0},
  {"batch_factor": 1.0, "base_lr": 4e-7, "imagenet_epoch": 800.0, "virtual_warmup_epoch": 20.0},
  {"batch_factor": 0.5, "base_lr": 1e-7, "imagenet_epoch": 200.0, "virtual_warmup_epoch": 0.0},
)

_LOCAL_BATCH = 8  # batch size of a smoke test; the published ones need a pod
_OF_STAGE = ("res", "img", "batch_size", *STAGES[0])  # arguments of a recipe that stages set
_PER_STAGE = "the stages set it; {}, or train one stage with openvision.py or openvision2.py"
_REFUSED = {
  **dict.fromkeys(
    ("imagenet_epoch", "virtual_warmup_epoch", "vitual_warmup_epoch"),
    _PER_STAGE.format("epochs_scale is a factor on all of them"),
  ),
  "base_lr": _PER_STAGE.format("it follows batch_scale"),
  "img": "give model=NAME to openvision_curriculum.py or openvision2_curriculum.py",
}


class Family(NamedTuple):
  """Models that share a recipe.

  Attributes:
    resolve: function from the arguments of the recipe to the configuration of one stage.
    defaults: default arguments of the recipe.
    published: names of the released code, as keyword arguments of `parse_arguments`.
    towers: arguments that name a tower of the same size as the encoder.
    models: encoder with patch size -> pixels of its stages.
  """

  resolve: Callable[[ConfigDict], ConfigDict]
  defaults: Mapping[str, Any]
  published: Mapping[str, Any]
  towers: tuple[str, ...]
  models: Mapping[str, tuple[int, ...]]


def make_curriculum(family: Family, arg: str | None, model: str = "") -> ConfigDict:
  """Return all stages of a model as one configuration.

  Args:
    family: family with recipe and models.
    arg: argument string; see apps/configs/README.md.
    model: one of `family.models`; "" takes it from `arg`.

  Raises:
    ValueError: an argument is unknown or out of range.
  """
  own: dict[str, Any] = {
    **({} if model else {"model": "L/14"}),
    "res": "",  # pixels of the stages, joined by "+"; "": as published
    "batch_scale": 1.0,  # factor on every batch size; learning rate and steps follow
    "epochs_scale": 1.0,  # factor on the length of every stage and warm-up
  }
  shared = {key: value for key, value in family.defaults.items() if key not in _OF_STAGE}
  shared |= dict.fromkeys(family.towers, "")  # "": same size as the encoder
  a = parse_arguments(
    arg,
    own | shared,
    **{
      **family.published,
      "aliases": {k: new for k, new in family.published["aliases"].items() if new in shared},
      "refused": _REFUSED | family.published["refused"],
    },
  )
  name = model or a.model
  if name not in family.models:
    raise ValueError(f"model={name!r}: expected one of {', '.join(family.models)}")
  for key in ("batch_scale", "epochs_scale"):
    if a[key] <= 0:
      raise ValueError(f"config argument {key}={a[key]}: expected a number above 0")
  passed = {key: a[key] for key in shared}
  for tower in family.towers:
    passed[tower] = passed[tower] or name.partition("/")[0]
  pixels = _pixels(a.res) or family.models[name]
  stages = [
    family.resolve(ConfigDict(passed | {"img": name, "res": px} | _stage(index, a)))
    for index, px in enumerate(pixels)
  ]
  config = stages[0]
  before = dict(leaf_values(config.to_dict()))
  changes = [
    {key: value for key, value in leaf_values(stage.to_dict()) if value != before[key]}
    for stage in stages
  ]
  config.stages = tuple(
    {"name": f"{px}px", **change} for px, change in zip(pixels, changes, strict=True)
  )
  return config


def _stage(index: int, a: ConfigDict) -> dict[str, Any]:
  """Return the recipe arguments of the stage with this index."""
  stage = dict(STAGES[min(index, len(STAGES) - 1)])
  stage["batch_factor"] *= a.batch_scale
  stage["imagenet_epoch"] *= a.epochs_scale
  stage["virtual_warmup_epoch"] *= a.epochs_scale
  return {**stage, "batch_size": _LOCAL_BATCH if a.runlocal else 0}


def _pixels(text: str) -> tuple[int, ...]:
  """Parse sizes such as `84+224`; "" gives ()."""
  parts = text.split("+") if text else []
  if not all(part.isdecimal() and int(part) for part in parts) or len(set(parts)) < len(parts):
    raise ValueError(f"config argument res={text!r}: expected different sizes, such as 84+224+336")
  return tuple(int(part) for part in parts)
