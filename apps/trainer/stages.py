"""A run is a list of stages; each is the whole configuration with a few changes.

`config.stages = ({"name": "84px", "total_steps": 1000, "model.image_size": 84}, {...})`: keys are
dotted paths of leaves. A stage starts from the params of the one before it, with a fresh
optimizer and schedule. A config without stages is one stage called "main".
"""

from collections.abc import Mapping
import dataclasses

from ml_collections import ConfigDict

from apps.trainer.names import leaves, nearest_leaf


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
  """Applies each stage's changes to the shared configuration.

  Raises:
    ValueError: there is no list of changes; a change names no leaf, or has another type; two stages
      share a name.
  """
  if not (
    isinstance(config.stages, list | tuple) and all(isinstance(s, Mapping) for s in config.stages)
  ):
    raise ValueError(
      f"config.stages={config.stages!r}; expected a list of changes, such as "
      "({'name': '84px', 'model.image_size': 84}, {'name': '224px', 'model.image_size': 224})"
    )
  changes = [dict(stage) for stage in config.stages] or [{"name": "main"}]
  stages: list[Stage] = []
  first_step = 0
  for index, change in enumerate(changes):
    name = str(change.pop("name", f"stage{index}"))
    if name in [stage.name for stage in stages]:
      raise ValueError(f"config.stages[{index}].name={name!r} stands twice; names must differ")
    own = ConfigDict(config.to_dict())
    own.stages = ()
    own.lock()
    known = list(leaves(own))
    if unknown := [key for key in change if key not in known]:
      near = nearest_leaf(unknown[0], known)
      raise ValueError(
        f"config.stages[{index}] ({name}): there is no setting {unknown[0]!r}"
        + (f"; did you mean {near!r}?" if near else "; apps/configs/base.py lists all")
      )
    try:
      own.update_from_flattened_dict(change)
    except (KeyError, TypeError) as error:
      raise ValueError(f"config.stages[{index}] ({name}): {error}") from error
    stages.append(Stage(index, name, own, first_step))
    first_step += own.total_steps
  return stages
