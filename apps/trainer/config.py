"""From the configuration tree to the typed configs of the parts; impossible values end here."""

from collections.abc import Sequence
import json
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from apps.trainer.augment import AugmentConfig
from apps.trainer.optimizer import OptimizerConfig
from apps.trainer.schedules import ScheduleConfig


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
  """`config.optimizer`; raises ValueError for values out of range."""
  fields = config.optimizer.to_dict()
  fields["schedule"] = ScheduleConfig(**fields["schedule"])
  fields["lr_multipliers"] = tuple((str(r), float(f)) for r, f in fields["lr_multipliers"])
  fields["frozen"] = tuple(fields["frozen"])
  return OptimizerConfig(**fields)


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

  Raises:
    ValueError: `ft_from` and `init_from.path` are both set, or an entry of `config.init_from.more`
      is not as described there.
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
  for index, source in enumerate(more):
    name = f"config.init_from.more[{index}]"
    if unknown := sorted(set(source) - set(shared)):
      raise ValueError(f"{name} has {', '.join(unknown)}; it may have {', '.join(shared)}")
    if not source.get("path"):
      raise ValueError(f"{name} has no path; give the workdir or a checkpoint of a run")
    for regexes in ("include", "exclude"):
      if isinstance(source.get(regexes, ()), str):
        raise ValueError(f"{name}.{regexes}={source[regexes]!r}; expected a tuple of them")
  sources = [(setting, shared)] if shared["path"] else []
  sources += [(f"config.init_from.more[{i}].path", source) for i, source in enumerate(more)]
  return [
    InitSettings(
      name, source.pop("path"), source.pop("step", None), source.pop("part", "params"), source
    )
    for name, source in sources
  ]


def check_values(config: ConfigDict) -> None:
  """Ranges of the trainer's own settings; those of the parts are checked by the parts.

  A setting that this kind of configuration does not have is passed over.

  Raises:
    ValueError: naming the setting, its value and what was expected.
  """
  for name, least in (
    ("batch_size", 1),
    ("total_steps", 1),
    ("accumulate", 1),
    ("log_every", 1),
    ("checkpoint.every", 1),
    ("checkpoint.keep_last", 1),
    ("checkpoint.keep_every", 0),
    ("hosts.slow_after", 10),
    ("hosts.gone_after", 10),
    ("eval.every", 0),
    ("eval.batch_size", 0),
    ("eval.examples", 0),
    ("eval.caption_examples", 0),
    ("eval.num_beams", 1),
    ("eval.gallery", 0),
    ("eval.zero_shot.examples", 0),
    ("eval.retrieval.examples", 0),
    ("eval.features.examples", 0),
    ("eval.features.k", 1),
    ("input.num_threads", 0),
    ("model.image_size", 1),
    ("model.token_len", 3),
    ("model.caption_len", 3),
    ("profile.start", 0),
    ("profile.steps", 0),
  ):
    value = _leaf(config, name)
    if value is not None and value < least:
      raise ValueError(f"config.{name}={value}; expected at least {least}")
  for name, low, high in (
    ("input.area_min", 0.0, 1.0),
    ("input.max_bad_fraction", 0.0, 1.0),
    ("eval.top_p", 0.0, 1.0),
  ):
    value = _leaf(config, name)
    if value is not None and not low <= value <= high:
      raise ValueError(f"config.{name}={value}; expected {low} to {high}")
  for name, allowed in (
    ("input.shuffle", ("global", "block", "none")),
    ("eval.method", ("greedy", "sample", "beam")),
    ("init_from.part", ("params", "ema")),
    ("init_from.patch_resize", ("pseudoinverse", "bilinear")),
  ):
    value = _leaf(config, name)
    if value is not None and value not in allowed:
      raise ValueError(f"config.{name}={value!r}; expected one of {', '.join(allowed)}")
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


def _leaf(config: ConfigDict, name: str) -> Any:
  """The value of a dotted name; None where this configuration has no such setting."""
  for part in name.split("."):
    if part not in config:
      return None
    config = config[part]
  return config
