"""Whole curricula: the stages of a published model as one configuration, one command.

A recipe (openvision.py, openvision2.py) resolves every stage as if it were a run of its own. The
first is the configuration; the leaves in which a later one differs are its entry in
`config.stages`. So batch, rate, steps and warm-up come from one arithmetic, whichever way a stage
is run.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from apps.configs.arguments import parse_arguments

# Of each stage; what is longer takes the last again. OpenVision published all three. OpenVision 2
# published the first two: that its third is as long is known, its batch, rate and warm-up are ours.
STAGES = (
  {"batch_factor": 2.0, "base_lr": 8e-6, "imagenet_epoch": 10_000.0, "virtual_warmup_epoch": 40.0},
  {"batch_factor": 1.0, "base_lr": 4e-7, "imagenet_epoch": 800.0, "virtual_warmup_epoch": 20.0},
  {"batch_factor": 0.5, "base_lr": 1e-7, "imagenet_epoch": 200.0, "virtual_warmup_epoch": 0.0},
)

_LOCAL_BATCH = 8  # of a trial; the published ones need a pod
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
    resolve: arguments of the recipe -> configuration of one stage.
    defaults: of those arguments.
    aliases, ignored, refused, values: see `parse_arguments`.
    towers: arguments that name a tower of the encoder's size.
    models: encoder with patch -> pixels of its stages.
  """

  resolve: Callable[[ConfigDict], ConfigDict]
  defaults: Mapping[str, Any]
  aliases: Mapping[str, str]
  ignored: Mapping[str, str]
  refused: Mapping[str, str]
  values: Mapping[str, Mapping[str, str]]
  towers: tuple[str, ...]
  models: Mapping[str, tuple[int, ...]]


def make_curriculum(family: Family, arg: str | None, model: str = "") -> ConfigDict:
  """All stages of a model as one configuration.

  Args:
    family: whose recipe and models.
    arg: the argument string; see apps/configs/README.md.
    model: one of `family.models`; "" lets `arg` choose.

  Raises:
    ValueError: an argument that is unknown, or out of range.
  """
  own: dict[str, Any] = {
    **({} if model else {"model": "L/14"}),
    "res": "",  # pixels of the stages, joined by "+"; "": as published
    "batch_scale": 1.0,  # of every batch; rate and steps follow it
    "epochs_scale": 1.0,  # of the length of every stage and warm-up
  }
  shared = {key: value for key, value in family.defaults.items() if key not in _OF_STAGE}
  shared |= dict.fromkeys(family.towers, "")  # "": of the encoder's size
  a = parse_arguments(
    arg,
    own | shared,
    aliases={old: new for old, new in family.aliases.items() if new in shared},
    ignored=family.ignored,
    refused={**_REFUSED, **family.refused},
    values=family.values,
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
  before = dict(_leaves(config.to_dict()))
  changes = [
    {key: value for key, value in _leaves(stage.to_dict()) if value != before[key]}
    for stage in stages
  ]
  config.stages = tuple(
    {"name": f"{px}px", **change} for px, change in zip(pixels, changes, strict=True)
  )
  return config


def _stage(index: int, a: ConfigDict) -> dict[str, Any]:
  """The arguments of a recipe that belong to the stage of this number."""
  stage = dict(STAGES[min(index, len(STAGES) - 1)])
  stage["batch_factor"] *= a.batch_scale
  stage["imagenet_epoch"] *= a.epochs_scale
  stage["virtual_warmup_epoch"] *= a.epochs_scale
  return {**stage, "batch_size": _LOCAL_BATCH if a.runlocal else 0}


def _pixels(text: str) -> tuple[int, ...]:
  """The sizes of `84+224`; () of nothing."""
  parts = text.split("+") if text else []
  if not all(part.isdecimal() and int(part) for part in parts) or len(set(parts)) < len(parts):
    raise ValueError(f"config argument res={text!r}: expected different sizes, such as 84+224+336")
  return tuple(int(part) for part in parts)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted name and value of each leaf."""
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", value
