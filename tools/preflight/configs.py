"""Configurations of the apps, outside the apps; imports nothing heavy before it is asked to."""

import importlib.util
import os
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

if TYPE_CHECKING:
  from apps.trainer.parts import MakeTask


def load(name: str) -> ConfigDict:
  """A configuration by path and argument, as `--config` takes it; it is not locked.

  Raises:
    ValueError: there is no such file, or it does not make one of this argument.
  """
  path, _, argument = name.partition(":")
  spec = importlib.util.spec_from_file_location("configuration", path)
  if spec is None or spec.loader is None or not os.path.isfile(path):
    raise ValueError("expected a Python file that exists, such as apps/configs/openvision2.py")
  module = importlib.util.module_from_spec(spec)
  try:  # the file runs here
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()
  except (AttributeError, ImportError, LookupError, SyntaxError, TypeError, ValueError) as error:
    raise ValueError(str(error)) from error


def task_of(config: ConfigDict) -> "MakeTask":
  """What the app of this kind of configuration makes its task with."""
  if "text" in config.model:
    from apps.clip_task import ClipTask

    return ClipTask.from_config
  from apps.caption_task import CaptionTask

  return CaptionTask.from_config
