"""The release in our own format: config.json and model.safetensors, which two libraries read.

`ov_models.load` reads the folder into JAX. Beside the two files lie a PyTorch module of one file,
`openvision_torch.py`, that reads it too and writes captions, and the tokenizer. config.json also
says how pictures and texts are made into inputs.
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
from ov_convert.release import Config, Imported, Preprocess, Release, Words
import ov_models
from ov_models.files import CONFIG_FILE, WEIGHTS_FILE

MODULE_FILE = "openvision_torch.py"
TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 256 << 20


def check(release: Release) -> None:
  """Raises ValueError, listing them, where tokenizer and pictures do not fit the model."""
  problems = [*_picture_problems(release), *_word_problems(release)]
  if problems:
    raise ValueError("the release does not fit together:\n  " + "\n  ".join(problems))


def write(folder: str | os.PathLike[str], release: Release) -> None:
  """Writes config.json, model.safetensors, openvision_torch.py and tokenizer.json.

  Raises:
    ValueError: see `check`, or parameters that `ov_models.save` refuses.
  """
  check(release)
  path, words = pathlib.Path(folder), release.words
  extra: dict[str, Any] = {"preprocess": dataclasses.asdict(release.preprocess), "words": None}
  if words is not None:
    extra["words"] = dataclasses.asdict(words)
    del extra["words"]["tokenizer_json"]  # a file of its own
  ov_models.save(path, release.config, release.params, dtype=release.dtype, extra=extra)
  shutil.copyfile(client_env.SCRIPTS / MODULE_FILE, path / MODULE_FILE)
  if words is not None:
    (path / TOKENIZER_FILE).write_text(words.tokenizer_json, "utf-8")


def similarity(release: Release) -> dict[str, float]:
  """What products of embeddings are multiplied by and added to; empty without a shared space."""
  if release.text is None:
    return {}
  bias = release.params.get("bias")
  scale = math.exp(float(release.params["log_scale"]))
  return {"logit_scale": scale, "logit_bias": 0.0 if bias is None else float(bias)}


def read(folder: str | os.PathLike[str]) -> Imported:
  """Reads what `write` wrote; also a folder of `ov_models.save`, without preprocessing and words.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file that is damaged or does not fit the others.
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
    raise ValueError(f"{where}model does not fit together: {reason}; export it anew.") from None
  preprocess, words = content.get("preprocess"), content.get("words")
  try:
    if preprocess is not None:
      preprocess = _preprocess(fields.section(content, "preprocess", ""))
    if words is not None:
      words = _words(fields.section(content, "words", ""), _tokenizer(path / TOKENIZER_FILE))
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(
      f"preprocess or words in {path / 'config.json'} do not fit: {error}; export the model anew."
    ) from None
  return _checked(config, params, preprocess, words)


# Fields of our configs that have a lower limit than the number of tokens in a vocabulary.
_LIMITS = {
  "depth": fields.MAX_DEPTH, "width": fields.MAX_WIDTH, "mlp_dim": 4 * fields.MAX_WIDTH,
  "num_heads": fields.MAX_WIDTH, "embed_dim": fields.MAX_WIDTH, "patch_size": fields.MAX_SIDE,
  "image_size": fields.MAX_SIDE, "max_len": fields.MAX_TOKENS, "num_queries": fields.MAX_TOKENS,
}  # fmt: skip


def _check_sizes(content: Mapping[str, Any], where: str) -> None:
  """Raises ValueError for numbers beyond any model, at any depth."""
  for name, value in content.items():
    if isinstance(value, Mapping):
      _check_sizes(value, f"{where}{name}.")
    elif isinstance(value, int):
      fields.whole(
        {name: int(value)}, name, None, _LIMITS.get(name, fields.MAX_VOCABULARY), where, 0
      )
    elif isinstance(value, float):
      fields.number(content, name, 0.0, where)
    elif value is not None and not isinstance(value, str):
      raise ValueError(f"{where}{name}={fields.shown(value)}; expected a number, a text or null.")


def _preprocess(content: Mapping[str, Any]) -> Preprocess:
  given = dict(content)
  given["image_size"] = fields.whole(given, "image_size", None, fields.MAX_SIDE)
  given |= {name: fields.three(given, name, ()) for name in ("mean", "std")}
  return Preprocess(**given)


def _words(content: Mapping[str, Any], tokenizer_json: str) -> Words:
  given = dict(content)
  given["length"] = fields.whole(given, "length", None, fields.MAX_TOKENS)
  for name in ("pad_id", "bos_id", "eos_id", "unk_id", "cls_id"):
    if name in ("unk_id", "cls_id") and given.get(name) is None:
      continue
    given[name] = fields.whole(given, name, None, fields.MAX_VOCABULARY, low=0)
  if not isinstance(given.get("append_cls"), bool):
    raise ValueError(f"append_cls={fields.shown(given.get('append_cls'))}; expected true or false.")
  return Words(tokenizer_json=tokenizer_json, **given)


def _checked(
  config: Config, params: Params, preprocess: Preprocess | None, words: Words | None
) -> Imported:
  if preprocess is not None:
    check(Release(config, params, preprocess, words))
  return Imported(config, params, preprocess, words)


def _tokenizer(file: pathlib.Path) -> str:
  if (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
    raise ValueError(f"{file.name} has {size} bytes; a tokenizer has at most 256 MiB")
  return file.read_text("utf-8")


def _picture_problems(release: Release) -> list[str]:
  size, image = release.preprocess.image_size, getattr(release.config, "encoder", release.config)
  if not isinstance(image, ov_models.ViTConfig) or size == image.image_size:
    return []
  return [
    f"preprocess.image_size={size}, but the image tower has image_size={image.image_size}; "
    "resample the positions first, and set both alike"
  ]


def _word_problems(release: Release) -> list[str]:
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
