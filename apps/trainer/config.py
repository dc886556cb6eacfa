"""From the configuration tree to the typed configs of the parts; impossible values end here."""

from collections.abc import Sequence
import dataclasses
import json
import typing
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from apps.trainer.augment import AugmentConfig
from apps.trainer.optimizer import OptimizerConfig
from apps.trainer.optimizers import OPTIMIZERS, AdamW, UpdateRule
from apps.trainer.rules import fields, flag, real, text, whole
from apps.trainer.schedules import ScheduleConfig
from apps.trainer.settings import check_settings

_TYPES = {bool: flag, int: whole(0), float: real(0), str: text}


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
  """`config.optimizer`; raises ValueError for values out of range."""
  values = config.optimizer.to_dict()
  values["schedule"] = ScheduleConfig(**values["schedule"])
  values["lr_multipliers"] = tuple((str(r), float(f)) for r, f in values["lr_multipliers"])
  values["frozen"] = tuple(values["frozen"])
  adamw = {field.name: values.pop(field.name) for field in dataclasses.fields(AdamW)}
  rule = _update_rule(values.pop("name"), values.pop("options"), AdamW(**adamw))
  return OptimizerConfig(**values, rule=rule)


def _update_rule(name: str, options: dict[str, Any], adamw: AdamW) -> UpdateRule:
  """The update rule of `config.optimizer.name`.

  Args:
    name: of `OPTIMIZERS`.
    options: fields of its dataclass.
    adamw: the fields of AdamW, which are settings of their own.

  Raises:
    ValueError: an option is unknown, of another type or out of range, or a setting of AdamW was
      changed that the rule does not use.
  """
  kind: Any = OPTIMIZERS[name]
  hints = typing.get_type_hints(kind)
  rules = {field: _TYPES[hint] for field, hint in hints.items() if hint in _TYPES}
  fields(rules)(f"config.optimizer.options (of {name})", options)
  if kind is AdamW:
    return dataclasses.replace(adamw, **options)
  if "adamw" in hints:
    return kind(**options, adamw=adamw)
  default = AdamW()
  for field in dataclasses.fields(AdamW):
    if (value := getattr(adamw, field.name)) != getattr(default, field.name):
      raise ValueError(
        f"config.optimizer.{field.name}={value!r} is of adamw and has no effect with "
        f"config.optimizer.name={name}; set config.optimizer.options, which may have "
        f"{', '.join(rules)}"
      )
  return kind(**options)


def augment_config(config: ConfigDict) -> AugmentConfig:
  """Colour jitter on or off; always the predecessor's strengths."""
  if config.input.color_jitter:
    return AugmentConfig()
  return AugmentConfig(jitter_probability=0.0, gray_probability=0.0)


class InitSettings(NamedTuple):
  """One source of `config.init_from`.

  Attributes:
    setting: what its path is called, for messages.
    path: of the checkpoint.
    step: which checkpoint; None takes the newest.
    part: the trained parameters or their average.
    options: of `init_from.plan_init`.
  """

  setting: str
  path: str
  step: int | None
  part: Literal["params", "ema"]
  options: dict[str, Any]


def init_sources(config: ConfigDict) -> list[InitSettings]:
  """Return the sources of `config.init_from`, the one of `config.ft_from` included, in order.

  Args:
    config: whose values were checked.

  Raises:
    ValueError: `ft_from` and `init_from.path` are both set.
  """
  shared = config.init_from.to_dict()
  more = [dict(source) for source in shared.pop("more")]
  setting = "config.init_from.path"
  if config.ft_from:
    if shared["path"]:
      raise ValueError(
        f"config.ft_from={config.ft_from} and config.init_from.path={shared['path']} are two names "
        "of one setting; give one of them"
      )
    setting, shared["path"] = "config.ft_from", config.ft_from
  sources = [(setting, shared)] if shared["path"] else []
  sources += [(f"config.init_from.more[{i}].path", source) for i, source in enumerate(more)]
  return [
    InitSettings(
      name, source.pop("path"), source.pop("step", None), source.pop("part", "params"), source
    )
    for name, source in sources
  ]


def check_values(config: ConfigDict) -> None:
  """Check every setting that does not depend on data or devices.

  Raises:
    ValueError: naming the setting, its value and what was expected.
  """
  check_settings(config)
  if config.eval.checkpoint_step is not None and not config.eval_only:
    raise ValueError(
      f"config.eval.checkpoint_step={config.eval.checkpoint_step} needs config.eval_only=True; "
      "training goes on from the newest checkpoint"
    )
  init_sources(config)


def to_json(config: ConfigDict) -> str:
  """The resolved configuration as text; the same for the same settings."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
  if isinstance(value, ConfigDict):
    return value.to_dict()
  if isinstance(value, Sequence):
    return list(value)
  raise TypeError(f"config holds a {type(value).__name__}: {value!r}")
