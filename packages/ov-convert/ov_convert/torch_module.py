"""Own format: config.json and model.safetensors, with a PyTorch module and the tokenizer.

`ov_models.load` loads the folder in JAX; the single-file PyTorch module `openvision_torch.py` loads
it in PyTorch and generates captions. config.json also describes image and text preprocessing.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import shutil
from typing import Any

from ov_convert import client_env, fields, reading
from ov_convert.name_map import Params
from ov_convert.release import (
  Config,
  Imported,
  Preprocess,
  Release,
  TokenizerSpec,
  option_problems,
)
import ov_models
from ov_models.files import CONFIG_FILE, WEIGHTS_FILE

MODULE_FILE = "openvision_torch.py"
TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 256 << 20
# Options that openvision_torch.py implements. A field that is added to the configs of ov_models is
# refused until it is listed here.
_BLOCK_OPTIONS = (
  "activation", "mlp", "norm", "norm_eps", "qkv_bias", "out_bias", "mlp_bias", "qk_norm",
  "attention_gate", "layer_scale",
)  # fmt: skip
_IMAGE_OPTIONS = (
  "cls_token", "registers", "patch_bias", "patch_norm", "pre_norm", "position", "rotary",
  "rotary_base", "pool", "pool_heads", "pool_mlp_dim",
)  # fmt: skip
_SUPPORTED = frozenset(
  [f"{part}.{name}" for part in ("encoder", "text", "decoder") for name in _BLOCK_OPTIONS]
  + [f"encoder.{name}" for name in _IMAGE_OPTIONS]
  + ["image_head", "text_head_bias"]
)


def check(release: Release, *, module: bool = True) -> None:
  """Raise ValueError listing all mismatches of tokenizer, preprocessing and model.

  Args:
    release: model.
    module: whether the PyTorch module must be able to run it.
  """
  if found := problems(release, module=module):
    raise ValueError(f"this model cannot be written in our format: {'; '.join(found)}.")


def problems(release: Release, *, module: bool = True) -> list[str]:
  """Return the problems that `check` raises, with the same arguments."""
  found = [*_image_problems(release), *_text_problems(release)]
  options = option_problems(release.config, _SUPPORTED) if module else []
  if options:
    found.append(f"{MODULE_FILE} does not support {', '.join(options)}; export as stablehlo")
  return found


def write(folder: str | os.PathLike[str], release: Release, *, module: bool = True) -> None:
  """Write config.json, model.safetensors, openvision_torch.py and tokenizer.json.

  Args:
    folder: folder to write to.
    release: model.
    module: whether to write openvision_torch.py.

  Raises:
    ValueError: see `check` and `ov_models.save`.
  """
  check(release, module=module)
  path, words = pathlib.Path(folder), release.words
  extra: dict[str, Any] = {"preprocess": dataclasses.asdict(release.preprocess), "words": None}
  if words is not None:
    extra["words"] = dataclasses.asdict(words)
    del extra["words"]["tokenizer_json"]  # stored in a separate file
  ov_models.save(path, release.config, release.params, dtype=release.dtype, extra=extra)
  if module:
    shutil.copyfile(client_env.SCRIPTS / MODULE_FILE, path / MODULE_FILE)
  if words is not None:
    (path / TOKENIZER_FILE).write_text(words.tokenizer_json, "utf-8")


def similarity(release: Release) -> dict[str, float]:
  """Return scale and bias of the similarity of embeddings; empty without a text tower."""
  if release.text is None:
    return {}
  bias = release.params.get("bias")
  scale = math.exp(float(release.params["log_scale"]))
  return {"logit_scale": scale, "logit_bias": 0.0 if bias is None else float(bias)}


def read(folder: str | os.PathLike[str]) -> Imported:
  """Read a folder written by `write`, or by `ov_models.save` (without preprocessing, tokenizer).

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is damaged or does not match the others.
  """
  path = pathlib.Path(folder)
  for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
    if (path / name).exists():
      reading.inside(path, name)
  content = ov_models.read_config(path)
  where = f"{path / CONFIG_FILE}: "
  _check_sizes(fields.section(content, "model", where), f"{where}model.")
  try:
    config, params = ov_models.load(path)
  except (AttributeError, TypeError, LookupError, ArithmeticError) as error:  # parts of wrong types
    reason = " ".join(str(error).split()[:40])
    raise ValueError(f"{where}model is inconsistent: {reason}; export it again.") from None
  preprocess, words = content.get("preprocess"), content.get("words")
  try:
    if preprocess is not None:
      preprocess = _preprocess(fields.section(content, "preprocess", ""))
    if words is not None:
      words = _words(fields.section(content, "words", ""), _tokenizer(path / TOKENIZER_FILE))
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(
      f"preprocess or words in {path / 'config.json'} are invalid: {error}; export the model again."
    ) from None
  return _checked(config, params, preprocess, words)


# Limits of integer fields of our configs; MAX_VOCABULARY applies to all others.
_LIMITS = {
  "depth": fields.MAX_DEPTH, "width": fields.MAX_WIDTH, "mlp_dim": 4 * fields.MAX_WIDTH,
  "num_heads": fields.MAX_WIDTH, "embed_dim": fields.MAX_WIDTH, "patch_size": fields.MAX_SIDE,
  "image_size": fields.MAX_SIDE, "max_len": fields.MAX_TOKENS, "num_queries": fields.MAX_TOKENS,
}  # fmt: skip


def _check_sizes(content: Mapping[str, Any], where: str) -> None:
  """Raise ValueError for numbers out of range, at any depth."""
  for name, value in content.items():
    if isinstance(value, Mapping):
      _check_sizes(value, f"{where}{name}.")
    elif isinstance(value, int):
      fields.integer(
        {name: int(value)}, name, None, _LIMITS.get(name, fields.MAX_VOCABULARY), where, 0
      )
    elif isinstance(value, float):
      fields.number(content, name, 0.0, where)
    elif value is not None and not isinstance(value, str):
      raise ValueError(f"{where}{name}={fields.shown(value)}; expected a number, a text or null.")


def _preprocess(content: Mapping[str, Any]) -> Preprocess:
  given = dict(content)
  given["image_size"] = fields.integer(given, "image_size", None, fields.MAX_SIDE)
  given |= {name: fields.channel_values(given, name, ()) for name in ("mean", "std")}
  return Preprocess(**given)


def _words(content: Mapping[str, Any], tokenizer_json: str) -> TokenizerSpec:
  given = dict(content)
  given["length"] = fields.integer(given, "length", None, fields.MAX_TOKENS)
  for name in ("pad_id", "bos_id", "eos_id", "unk_id", "cls_id"):
    if name in ("bos_id", "unk_id", "cls_id") and given.get(name) is None:
      given[name] = None
      continue
    given[name] = fields.integer(given, name, None, fields.MAX_VOCABULARY, low=0)
  if not isinstance(given.get("append_cls"), bool):
    raise ValueError(f"append_cls={fields.shown(given.get('append_cls'))}; expected true or false.")
  return TokenizerSpec(tokenizer_json=tokenizer_json, **given)


def _checked(
  config: Config, params: Params, preprocess: Preprocess | None, words: TokenizerSpec | None
) -> Imported:
  if preprocess is not None:
    check(Release(config, params, preprocess, words), module=False)
  return Imported(config, params, preprocess, words)


def _tokenizer(file: pathlib.Path) -> str:
  if (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
    raise ValueError(f"{file.name} has {size} bytes; expected at most 256 MiB")
  return file.read_text("utf-8")


def _image_problems(release: Release) -> list[str]:
  size, image = release.preprocess.image_size, getattr(release.config, "encoder", release.config)
  if not isinstance(image, ov_models.ViTConfig) or size == image.image_size:
    return []
  return [
    f"preprocess.image_size={size}, but the image tower has image_size={image.image_size}; "
    "resample the positions first, and set both to the same size"
  ]


def _text_problems(release: Release) -> list[str]:
  words, text = release.words, release.text
  if isinstance(release.config, ov_models.TextConfig):
    text = release.config
  reader = text or getattr(release.config, "decoder", None)
  if words is None or reader is None:
    return []
  problems = [
    f"words.{name}={number} is outside the vocabulary of {reader.vocab_size} tokens"
    for name in ("pad_id", "bos_id", "eos_id", "unk_id", "cls_id")
    if (number := getattr(words, name)) is not None and not 0 <= number < reader.vocab_size
  ]
  if text is None:
    return problems
  if words.length > text.max_len or (text.pool == "last" and words.length != text.max_len):
    problems.append(f"words.length={words.length}, but the text tower has max_len={text.max_len}")
  if text.padding == "mask" and words.pad_id != text.pad_id:
    problems.append(f"words.pad_id={words.pad_id}, but the text tower has pad_id={text.pad_id}")
  return problems
