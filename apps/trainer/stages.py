"""A run is a list of stages; each is the whole configuration with a few changes.

`config.stages = ({"name": "84px", "total_steps": 1000, "model.image_size": 84}, {...})`: keys are
dotted paths of leaves. A stage starts from the params of the one before it, with a fresh
optimizer and schedule. A config without stages is one stage called "main".
"""

from collections.abc import Mapping
import dataclasses
import re

from ml_collections import ConfigDict

from apps.trainer.names import leaves, nearest_leaf
from apps.trainer.rules import COUNT, shown
from apps.trainer.settings import check_settings

# A name is part of file names, of metric lines and of markup.
_NAME = re.compile(r"[\w.+=@-]([\w .+=@-]{0,62}[\w.+=@-])?")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run."""

  index: int
  name: str
  config: ConfigDict
  first_step: int  # steps of all stages before this one

  @property
  def last_step(self) -> int:
    return self.first_step + self.config.total_steps


def resolve_stages(config: ConfigDict) -> list[Stage]:
  """Apply each stage's changes to the shared configuration, and check the result.

  Raises:
    ValueError: there is no list of changes; a change names no leaf, has another type or a value out
      of range; a name cannot be used, or two stages share it.
  """
  if not (
    isinstance(config.stages, list | tuple)
    and all(isinstance(stage, Mapping | ConfigDict) for stage in config.stages)
  ):
    raise ValueError(
      f"config.stages={shown(config.stages)}; expected a list of changes, such as "
      "({'name': '84px', 'model.image_size': 84}, {'name': '224px', 'model.image_size': 224})"
    )
  changes = [dict(stage) for stage in config.stages] or [{"name": "main"}]
  stages: list[Stage] = []
  first_step = 0
  for index, change in enumerate(changes):
    name = change.pop("name", f"stage{index}")
    if type(name) is not str or not _NAME.fullmatch(name):
      raise ValueError(
        f"config.stages[{index}].name={shown(name)}; expected 1 to 64 letters, digits, spaces and "
        "any of . _ + = @ -, such as '84px'"
      )
    if name in [stage.name for stage in stages]:
      raise ValueError(f"config.stages[{index}].name={name!r} stands twice; names must differ")
    where = f"config.stages[{index}] ({name}): "
    own = ConfigDict(config.to_dict())
    own.stages = ()
    own.lock()
    known = [key for key in leaves(own) if key != "stages"]
    if unknown := [key for key in change if key not in known]:
      near = nearest_leaf(str(unknown[0]), known)
      raise ValueError(
        f"{where}there is no setting {shown(unknown[0])}"
        + (f"; did you mean {near!r}?" if near else "; apps/configs/base.py lists all")
      )
    try:
      own.update_from_flattened_dict(change)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
      raise ValueError(f"{where}{' '.join(str(error).split())}") from error
    check_settings(own, where)
    stages.append(Stage(index, name, own, first_step))
    first_step += own.total_steps
  if first_step > COUNT:
    raise ValueError(
      f"config.total_steps: all stages together have {first_step:,} steps; expected at most "
      f"{COUNT:,}"
    )
  return stages
