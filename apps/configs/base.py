"""Default configurations of both training apps; recipes override them.

`apps/trainer/run_config.py` documents every setting with its type and limits.
"""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from apps.configs import published
from apps.trainer.names import MOVED
from apps.trainer.run_config import ModelSettings, RunConfig
from apps.trainer.section import Section, is_section


def caption_config() -> ConfigDict:
  """Return all settings with the defaults of //apps:caption_train, a captioner."""
  config = clip_config()
  config.model.update(
    text="",
    decoder_kind="teacher_forced",
    token_len=128,
    caption_len=0,
    keep_ratio=0.35,
  )
  config.loss.update(clip=0.0, caption=1.0)
  config.input.update(alt_keys=(), caption_keys=("txt",), sentence_positive=False)
  config.eval.gallery = 24
  return config


def clip_config() -> ConfigDict:
  """Return all settings with the defaults of //apps:clip_train, two towers and a decoder."""
  return ConfigDict(_default_tree(RunConfig))


def resolve(config: ConfigDict) -> RunConfig:
  """Return the typed settings of a configuration; old names and values are converted.

  Args:
    config: configuration from a file and flags.

  Raises:
    ValueError: a setting is unknown, has the wrong type, is out of range, or is set by two names.
  """
  tree = plain(config)
  for old, new in MOVED.items():
    (section, name), (new_section, new_name) = old.split("."), new.split(".")
    if not isinstance(tree.get(section), dict) or name not in tree[section]:
      continue
    value, current = tree[section].pop(name), tree[new_section][new_name]
    unset = [make()[new_section][new_name] for make in (clip_config, caption_config)]
    if current not in (value, *unset):
      raise ValueError(
        f"config.{old}={value} is now called config.{new}, which is {current}; set only "
        f"config.{new}"
      )
    tree[new_section][new_name] = value
  resolved = RunConfig.parse(tree)
  if remat := published.REMAT.get(resolved.model.remat):
    logging.warning("config.model.remat=%s is now called %s", resolved.model.remat, remat)
    resolved = resolved.with_settings({"model.remat": remat})
  return resolved


def plain(value: Any) -> Any:
  """Convert nested ConfigDicts to dicts."""
  if isinstance(value, ConfigDict | Mapping):
    return {name: plain(value[name]) for name in value}
  return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def model_of(saved: Mapping[str, Any]) -> ModelSettings:
  """Return the `model` section of a saved configuration of any version.

  Early versions had one model per app and saved only the settings of that app.
  """
  model = (clip_config() if "text" in saved else caption_config()).model.to_dict()
  return ModelSettings.parse(model | {k: v for k, v in saved.items() if k in model}, path="model")


def _default_tree(kind: type[Section]) -> dict[str, Any]:
  """Return the defaults of a section as nested dicts, for a ConfigDict.

  Optional settings become placeholders with their type, so that flags can set them.
  """
  hints = typing.get_type_hints(kind)
  tree: dict[str, Any] = {}
  for field in dataclasses.fields(kind):
    hint = hints[field.name]
    if is_section(hint):
      tree[field.name] = _default_tree(hint)
    elif isinstance(hint, types.UnionType):
      tree[field.name] = placeholder(typing.get_args(hint)[0])
    else:
      tree[field.name] = getattr(kind(), field.name)
  return tree
