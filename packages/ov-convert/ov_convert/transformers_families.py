"""transformers format of model families with a separate class: CLIP, SigLIP, DINOv2 and others.

A folder of these classes is read and written with its own tensors, so a model that was imported
from it is exported as the same class. `transformers_vit` handles all other models.

  model = AutoModel.from_pretrained(folder)
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from ov_convert import fields, hf_tokenizer, reading, transformers_forms
from ov_convert.families.family import Family
from ov_convert.families.table import TRANSFORMERS
from ov_convert.release import Config, Imported, Release, encoder_of
from ov_convert.writing import write_json, write_weights
import ov_models

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
_WEIGHTS_FILES = (WEIGHTS_FILE, "pytorch_model.bin")


def of_content(content: Mapping[str, Any]) -> Family | None:
  """Return the family of the content of config.json, or None."""
  kind = content.get("model_type")
  found = (f for f in TRANSFORMERS if f.model_type == kind and f.applies(content))
  return next(found, None)


def of_config(config: Config) -> Family | None:
  """Return the first family that represents a config, or None."""
  return next((family for family in TRANSFORMERS if not family.problems(config)), None)


def nearest_problems(config: Config) -> str:
  """Return the family with the fewest unsupported fields, with these fields, in one line."""
  found = [(family.problems(config), family.name) for family in TRANSFORMERS]
  problems, name = min(found, key=lambda each: len(each[0]))
  return f"{name} is the nearest, without {'; '.join(problems)}"


def read(
  root: pathlib.Path, content: Mapping[str, Any], family: Family, python: Any = None
) -> Imported:
  """Read a folder of a family.

  Args:
    root: directory with the files.
    content: content of config.json.
    family: family returned by `of_content`.
    python: interpreter with PyTorch for *.bin; see `reading.read_tensors`.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a field or a tensor has no counterpart; names all of them.
  """
  where = f"{root / CONFIG_FILE}: "
  config = family.read_config(content, where)
  given = reading.read_tensors(root, _WEIGHTS_FILES, python)
  encoder = encoder_of(config)
  for name, tower in (("encoder", encoder), ("text", getattr(config, "text", None))):
    if tower is not None:
      sizes = {"width": tower.width, "MLP width": tower.mlp_dim}
      fields.check_against_weights(given, tower.depth, sizes, f"{where}{name} ")
  flat = family.canonical(given)
  names = family.name_map(config)
  notes = [
    f"{name} is not imported: {why}"
    for name, why in names.ignored.items()
    if name in flat and not name.endswith("position_ids")
  ]
  params = names.to_ours(flat, config)
  ov_models.bind(config, params)
  preprocess = None
  if (root / PREPROCESSOR_FILE).exists():
    settings = reading.read_json(root / PREPROCESSOR_FILE)
    preprocess, more = transformers_forms.preprocess_from(settings, encoder.image_size)
    notes += more
  words, text = None, getattr(config, "text", None)
  if text is not None:
    words, more = hf_tokenizer.read_folder(root, text)
    notes += more
  return Imported(config, params, preprocess, words, tuple(notes))


def write(folder: pathlib.Path, release: Release, family: Family) -> None:
  """Write config.json, model.safetensors, and the tokenizer of a text tower.

  Args:
    folder: directory to write to.
    release: model without `Family.problems`.
    family: family of the model.
  """
  config, params = release.config, release.params
  if not family.joint and not isinstance(config, ov_models.ViTConfig):
    config, params = release.encoder, release.image_params
  names = family.name_map(config)
  flat = names.to_theirs(params, config)
  if family.zeros is not None:
    flat |= {name: np.zeros(shape, np.float32) for name, shape in family.zeros(config).items()}
  folder.mkdir(parents=True, exist_ok=True)
  write_weights(folder / WEIGHTS_FILE, flat, release.dtype, names.fixed)
  if release.words is not None and family.joint:
    hf_tokenizer.write_tokenizer(folder, release.words, template=True)
  content = family.write_config(config) | {"dtype": release.dtype}
  write_json(folder / CONFIG_FILE, content)
