"""timm format of image towers with options, see `families.timm_towers`."""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

import numpy as np

from ov_convert import fields
from ov_convert.families.timm_towers import TOWERS, Tower
from ov_convert.name_map import Flat
from ov_convert.release import Imported, Release
import ov_models

_POSITIONS = "pos_embed"


def of_architecture(name: Any) -> Tower | None:
  """Return the tower of an architecture, which may have a tag after a dot, or None."""
  plain = name.partition(".")[0] if isinstance(name, str) else ""
  return next((tower for tower in TOWERS if re.fullmatch(tower.pattern, plain)), None)


def of_config(config: ov_models.ViTConfig) -> Tower | None:
  """Return the first tower that represents a config, or None."""
  return next((tower for tower in TOWERS if not tower.family.problems(config)), None)


def nearest_problems(config: ov_models.ViTConfig) -> str:
  """Return the tower with the fewest unsupported fields, with these fields, in one line."""
  found = [(tower.family.problems(config), tower.family.name) for tower in TOWERS]
  problems, name = min(found, key=lambda each: len(each[0]))
  return f"{name} is the nearest, without {'; '.join(problems)}"


def read(
  where: str, content: Mapping[str, Any], flat: Flat, tower: Tower
) -> tuple[ov_models.ViTConfig, dict[str, Any], list[str]]:
  """Return config, parameters and notes of an image tower.

  Args:
    where: file of the configuration, for messages.
    content: content of config.json.
    flat: tensors by name.
    tower: result of `of_architecture`.

  Raises:
    ValueError: if an argument or a tensor has no counterpart; names all of them.
  """
  arguments = tower.content(content, flat)
  config = tower.family.read_config(arguments, f"{where}: model_args: ")
  assert isinstance(config, ov_models.ViTConfig)
  sizes = {"embed_dim": config.width, "MLP width": config.mlp_dim}
  fields.check_against_weights(flat, config.depth, sizes, where)
  if tower.no_embed_class and _POSITIONS in flat and flat[_POSITIONS].ndim == 3:
    # The position of cls is a part of the cls token there.
    table = flat[_POSITIONS]
    flat = flat | {_POSITIONS: np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)}
  names = tower.family.name_map(config)
  notes = [f"{n} is not imported: {why}" for n, why in names.ignored.items() if n in flat]
  return config, names.to_ours(flat, config), notes


def write(release: Release, tower: Tower) -> tuple[Flat, dict[str, Any]]:
  """Return the tensors of the image tower and the arguments of its architecture."""
  config = release.encoder
  flat = tower.family.name_map(config).to_theirs(release.image_params, config)
  if tower.no_embed_class:
    table = flat[_POSITIONS]
    flat["cls_token"] = flat["cls_token"] + table[:, :1]
    flat[_POSITIONS] = np.ascontiguousarray(table[:, 1:])
  if isinstance(release.config, ov_models.VisionLanguageConfig) and release.config.image_head:
    if release.config.text is not None:
      kernel = np.asarray(release.params["image_head"]["kernel"])
      flat["head.weight"] = np.ascontiguousarray(kernel.T)
      flat["head.bias"] = np.zeros(kernel.shape[1], np.float32)
  return flat, tower.model_args(config)


def read_folder(
  root: pathlib.Path, content: Mapping[str, Any], flat: Flat, tower: Tower, preprocess: Any
) -> Imported:
  """Return the tower of a folder; see `read`.

  Args:
    root: folder, for messages.
    content: content of config.json.
    flat: tensors by name.
    tower: result of `of_architecture`.
    preprocess: function of config.json and image size that returns preprocessing and notes.
  """
  config, params, notes = read(str(root / "config.json"), content, flat, tower)
  ov_models.bind(config, params)
  found, more = preprocess(content, config.image_size)
  return Imported(config, params, found, None, (*notes, *more))
