"""Stages of a run; each stage is the shared configuration with a few changes.

`config.stages = ({"name": "84px", "total_steps": 1000, "model.image_size": 84}, {...})`: keys are
dotted paths of settings. A stage starts from the parameters of the previous one, with a fresh
optimizer and schedule. A config without stages has one stage called "main".
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from apps.trainer.names import MOVED
from apps.trainer.rules import COUNT, shown
from apps.trainer.run_config import RunConfig

# Names are used in file names, metric lines and markup.
_NAME = re.compile(r"[\w.+=@-]([\w .+=@-]{0,62}[\w.+=@-])?")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run."""

  index: int
  name: str
  config: RunConfig
  first_step: int  # number of steps of all previous stages

  @property
  def last_step(self) -> int:
    return self.first_step + self.config.total_steps


def resolve_stages(config: RunConfig) -> list[Stage]:
  """Apply each stage's changes to the shared configuration, and check the result.

  Raises:
    ValueError: a change has an unknown name, a wrong type or a value out of range; or a name of a
      stage is invalid or used twice.
  """
  changes = [_renamed(stage) for stage in config.stages] or [{"name": "main"}]
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
      raise ValueError(f"config.stages[{index}].name={name!r} is used twice; names must be unique")
    where = f"config.stages[{index}] ({name}): "
    if "stages" in change:
      raise ValueError(f"{where}unknown setting 'stages'; stages cannot be nested")
    own = dataclasses.replace(config, stages=()).with_settings(change, where)
    stages.append(Stage(index, name, own, first_step))
    first_step += own.total_steps
  if first_step > COUNT:
    raise ValueError(
      f"config.total_steps: all stages together have {first_step:,} steps; expected at most "
      f"{COUNT:,}"
    )
  return stages


def _renamed(changes: Mapping[str, Any]) -> dict[str, Any]:
  """Return the changes of a stage with the current names of settings."""
  return {MOVED.get(name, name): value for name, value in changes.items()}
