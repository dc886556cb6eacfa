"""From the configuration tree to the typed configs of the parts; impossible values end here."""

from collections.abc import Iterator, Mapping, Sequence
import difflib
import json
from typing import Any

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


def init_sources(config: ConfigDict) -> list[dict[str, Any]]:
  """Arguments of `init_from.init_from` for each source of `config.init_from`, in order.

  Raises:
    ValueError: an entry of `config.init_from.more` is not as described there.
  """
  wanted = config.init_from.to_dict()
  more = [dict(source) for source in wanted.pop("more")]
  for index, source in enumerate(more):
    name = f"config.init_from.more[{index}]"
    if unknown := sorted(set(source) - set(wanted)):
      raise ValueError(f"{name} has {', '.join(unknown)}; it may have {', '.join(wanted)}")
    if not source.get("path"):
      raise ValueError(f"{name} has no path; give the workdir or a checkpoint of a run")
    for regexes in ("include", "exclude"):
      if isinstance(source.get(regexes, ()), str):
        raise ValueError(f"{name}.{regexes}={source[regexes]!r}; expected a tuple of them")
  sources = ([wanted] if wanted["path"] else []) + more
  return [{"source": source.pop("path"), **source} for source in sources]


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


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
  """Yield the dotted names of all settings, those of whole sections too."""
  for key, value in tree.items():
    yield f"{path}{key}"
    if isinstance(value, Mapping | ConfigDict):
      yield from leaves(value, f"{path}{key}.")


def nearest_leaf(name: str, names: Sequence[str]) -> str | None:
  """Return the setting that a misspelt name most likely means.

  Args:
    name: dotted, such as "optimiser.learning_rate".
    names: all settings.

  Returns:
    The nearest of `names`, else the nearest with an equal last part; None where nothing is near.
  """
  if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
    return near[0]
  last = {known.rpartition(".")[2]: known for known in reversed(names)}
  near = difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
  return last[near[0]] if near else None


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
