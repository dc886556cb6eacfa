"""Loaders of a run from its configuration."""

import os

import jax
import numpy as np
import ov_data
import ov_sharding
from ml_collections import ConfigDict


def sources(config: ConfigDict, *, held_out: bool = False) -> list[ov_data.Source]:
  """The training or held-out sources of `config.input`.

  Raises:
    ValueError: neither data_dir nor sources is set, or both are.
  """
  inputs = config.input
  shared = {"image_key": inputs.image_key, "caption_keys": tuple(inputs.caption_keys)}
  if held_out:
    return [ov_data.Source(inputs.eval_data_dir, split=inputs.eval_split or None, **shared)]
  if inputs.data_dir and inputs.sources:
    raise ValueError("config.input.data_dir and config.input.sources are both set; use one")
  if inputs.data_dir:
    return [ov_data.Source(inputs.data_dir, split=inputs.split or None, **shared)]
  if not inputs.sources:
    raise ValueError(
      "no training data: set --config.input.data_dir to a folder of record shards, a glob or a "
      "TFDS directory (local or gs://)"
    )
  return [ov_data.Source(**{**shared, **dict(source)}) for source in inputs.sources]
