"""Save and load models as config.json and model.safetensors.

  config, params = ov_models.load("folder")
  model = ov_models.bind(config, params)

Tensor names are parameter paths ("encoder/blocks/attn/query/kernel") with stacked layers, as in
`init`. Loading executes no code and checks sizes before it reads tensors.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ov_models.config import check_choice, from_fields, shown
from ov_models.decoder import DecoderConfig
from ov_models.functional import (
  Config,
  Params,
  abstract_params,
  bind,
  differences,
  first_few,
  plain_dict,
)
from ov_models.model_config import VisionLanguageConfig
from ov_models.query_decoder import QueryDecoderConfig
from ov_models.text import TextConfig
from ov_models.upgrade import upgrade_model
from ov_models.vit_config import ViTConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FILE_DTYPES = ("float32", "bfloat16", "float16")
_FORMAT = 2
_MAX_CONFIG_BYTES = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")
_KINDS = {
  kind.__name__.removesuffix("Config"): kind
  for kind in (
    ViTConfig,
    TextConfig,
    VisionLanguageConfig,
    DecoderConfig,
    QueryDecoderConfig,
  )
}


def save(
  folder: str | os.PathLike[str],
  config: Config,
  params: Params,
  *,
  dtype: str = "float32",
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Write config.json and model.safetensors to `folder`.

  Args:
    folder: output folder, created if it does not exist.
    config: configuration of the model.
    params: parameters of the model.
    dtype: dtype of the tensors in the file: "float32", "bfloat16" or "float16".
    extra: additional top-level JSON values of config.json.

  Raises:
    ValueError: if the parameters do not match the config, contain NaN or Inf, or overflow `dtype`.
  """
  check_choice("dtype", dtype, FILE_DTYPES)
  bind(config, params)
  params = plain_dict(params)
  flat = {name: _cast(name, value, dtype) for name, value in _flatten(params).items()}
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  content = {"format": _FORMAT, "library": "openvision", "dtype": dtype}
  content |= {"model": config_to_dict(config), **(extra or {})}
  text = json.dumps(content, indent=2) + "\n"
  # Both files are complete before either is renamed, so readers never see a partial file.
  with tempfile.TemporaryDirectory(prefix=".model-", dir=path) as unfinished:
    weights, config_file = (pathlib.Path(unfinished) / n for n in (WEIGHTS_FILE, CONFIG_FILE))
    safetensors.numpy.save_file(flat, weights, metadata={"format": "np"})
    config_file.write_text(text, "utf-8")
    for file in (weights, config_file):
      with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
    (path / CONFIG_FILE).unlink(missing_ok=True)
    weights.replace(path / WEIGHTS_FILE)
    config_file.replace(path / CONFIG_FILE)


def load(folder: str | os.PathLike[str]) -> tuple[Config, Params]:
  """Load a model that `save` wrote.

  Returns:
    The config, and float32 parameters on the host for `bind`.

  Raises:
    FileNotFoundError: if one of the two files is missing.
    ValueError: if a file is damaged or of a later format, or if the files do not match.
  """
  path = pathlib.Path(folder)
  try:
    config = config_from_dict(read_config(path)["model"])
    if not isinstance(config, Config):
      raise ValueError(f"a {type(config).__name__} is a part of a model, not a model.")
  except ValueError as error:
    if str(error).startswith(str(path)):
      raise
    raise ValueError(f"{path / CONFIG_FILE}: {error}") from None
  expected = _flatten(abstract_params(config))
  try:
    with safetensors.safe_open(path / WEIGHTS_FILE, "np") as file:
      found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
      _check_shapes(path / WEIGHTS_FILE, expected, found)
      for name in expected:
        if (kind := file.get_slice(name).get_dtype()) not in _FLOATS:
          raise ValueError(f"{path / WEIGHTS_FILE}: {name} is {kind}; expected {_FLOATS}.")
      flat = {name: np.asarray(file.get_tensor(name), np.float32) for name in expected}
  except safetensors.SafetensorError as error:
    reason = " ".join(str(error).split())
    raise ValueError(f"{path / WEIGHTS_FILE} is damaged: {reason}.") from None
  for name, value in flat.items():
    if not np.isfinite(value).all():
      raise ValueError(f"{path / WEIGHTS_FILE}: {name} contains NaN or Inf.")
  return config, _unflatten(flat)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Return the content of config.json of a saved model, including `extra`.

  Raises:
    FileNotFoundError: if one of the two files is missing.
    ValueError: if the file is damaged, from another library or of a later format.
  """
  file = pathlib.Path(folder) / CONFIG_FILE
  for name in (CONFIG_FILE, WEIGHTS_FILE):
    if not file.with_name(name).is_file():
      raise FileNotFoundError(f"no model in {folder}: {name} is missing.")
  if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
    raise ValueError(f"{file} has {size} bytes; a configuration has at most {_MAX_CONFIG_BYTES}.")
  try:
    content = json.loads(file.read_text("utf-8"), object_pairs_hook=_reject_duplicate_keys)
    library, version = content["library"], int(content["format"])
    content["model"]["kind"]
  except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
    raise ValueError(
      f"{file} was not written by ov_models.save: {type(error).__name__}: {error}. Import models "
      "of other libraries with //apps:export."
    ) from None
  if library != "openvision" or version > _FORMAT:
    raise ValueError(
      f"{file} has library {library!r}, format {version}; this version reads openvision, up to "
      f"format {_FORMAT}."
    )
  return content


def config_to_dict(config: Any) -> dict[str, Any]:
  """Convert a config to JSON values; "kind" is the name of the class."""
  fields: dict[str, Any] = {"kind": type(config).__name__.removesuffix("Config")}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    fields[field.name] = config_to_dict(value) if dataclasses.is_dataclass(value) else value
  return fields


def config_from_dict(fields: Mapping[str, Any]) -> Any:
  """Convert the result of `config_to_dict` of this or an earlier version back to a config.

  Raises:
    ValueError: if the kind is unknown, or a field is unknown, missing or invalid.
  """
  if not isinstance(fields, Mapping):
    raise ValueError(f"model={shown(fields)}; expected an object with a kind and its fields.")
  fields = upgrade_model(fields)
  kind = fields.get("kind")
  check_choice("kind", kind, _KINDS)
  values = {
    name: config_from_dict(value) if isinstance(value, Mapping) else value
    for name, value in fields.items()
    if name != "kind"
  }
  return from_fields(_KINDS[str(kind)], values)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Return the dict of a JSON object; raise ValueError for duplicate keys."""
  found = dict(pairs)
  if len(found) < len(pairs):
    twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
    raise ValueError(f"key {shown(twice)} appears twice")
  return found


def _cast(name: str, value: Any, dtype: str) -> np.ndarray:
  array = np.asarray(value, np.float32)
  if not np.isfinite(array).all():
    raise ValueError(f"cannot save: {name} contains NaN or Inf.")
  with np.errstate(over="ignore"):  # reported below with the parameter name
    rounded = np.asarray(array.astype(jnp.dtype(dtype)), order="C")
  if not np.isfinite(rounded).all():
    raise ValueError(
      f"{name} has values up to {np.abs(array).max():.3g}, which overflow {dtype}; use bfloat16."
    )
  return rounded


def _check_shapes(
  file: pathlib.Path, expected: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]
) -> None:
  want = {name: tuple(leaf.shape) for name, leaf in expected.items()}
  if want == found:
    return
  raise ValueError(
    f"{file} does not match {CONFIG_FILE} in the same folder: "
    f"{first_few(differences(want, found))}."
  )


def _flatten(params: Params) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _unflatten(flat: Mapping[str, Any]) -> Params:
  tree: Params = {}
  for name, value in flat.items():
    *parents, leaf = name.split("/")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[leaf] = value
  return tree
