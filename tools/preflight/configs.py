"""Load configurations of the apps outside the apps. Heavy imports are deferred."""

import importlib.util
import os

from ml_collections import ConfigDict

from apps.configs import base
from apps.trainer.run_config import RunConfig


def load(name: str) -> ConfigDict:
  """Load a configuration from `path:argument`, as in `--config`, without locking it.

  Raises:
    ValueError: if the file does not exist or rejects the argument.
  """
  path, _, argument = name.partition(":")
  spec = importlib.util.spec_from_file_location("configuration", path)
  if spec is None or spec.loader is None or not os.path.isfile(path):
    raise ValueError("expected a Python file that exists, such as apps/configs/openvision2.py")
  module = importlib.util.module_from_spec(spec)
  try:  # executes the file
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()
  except (AttributeError, ImportError, LookupError, SyntaxError, TypeError, ValueError) as error:
    raise ValueError(str(error)) from error


def resolved(name: str) -> RunConfig:
  """Return the resolved settings of a configuration; see `load`."""
  return base.resolve(load(name))
