"""transformers format of text towers.

mask="full", pool="last" becomes a SiglipTextModel, whose `pooler_output` is the unnormalised
embedding. mask="causal", pool="argmax" becomes a CLIPTextModelWithProjection, whose `text_embeds`
is the unnormalised embedding. config.json states the class; AutoModel loads neither with its head.

  tokenizer = AutoTokenizer.from_pretrained(folder)
  inputs = tokenizer(texts, truncation=True, max_length=T, padding="max_length",
                     return_tensors="pt")
  SiglipTextModel.from_pretrained(folder)(**inputs).pooler_output

Whether padding is attended to is not a config field in transformers, but decided by the caller:
pass the attention_mask as above for padding="mask", and only input_ids for padding="attend".
config.json states the choice under "openvision". If the last column is [CLS] ("append_cls"),
max_length is T - 1, and

  ids = torch.nn.functional.pad(inputs.input_ids, (0, 1), value=tokenizer.cls_token_id)
  mask = torch.nn.functional.pad(inputs.attention_mask, (0, 1), value=1)

Dimensions: T tokens, D width, E embed, V vocab.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any, Literal

import numpy as np

from ov_convert import fields, reading
from ov_convert.hf_tokenizer import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from ov_convert.hf_tokenizer import TOKENIZER_FILE, tokenizer_spec_from, write_tokenizer
from ov_convert.name_map import SAME, TRANSPOSE, Dropped, Entry, Fixed, NameMap
from ov_convert.release import Release, TokenizerSpec
from ov_convert.writing import write_json, write_weights
import ov_models

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_Mask = Literal["full", "causal"]
_Pool = Literal["last", "first", "argmax", "mean", "map"]
# By (mask, pool): model_type, class, and the name of E in config.json.
KINDS: dict[tuple[_Mask, _Pool], tuple[str, str, str]] = {
  ("full", "last"): ("siglip_text_model", "SiglipTextModel", "projection_size"),
  ("causal", "argmax"): ("clip_text_model", "CLIPTextModelWithProjection", "projection_dim"),
}
# eos_token_id of the CLIP class that means: pool at the largest id, whatever the end token is.
LARGEST_ID = 2
_OURS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}

_LINEAR = (("weight", "kernel", TRANSPOSE), ("bias", "bias", SAME))
_NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))
# theirs (below the layer), ours (below the blocks), transform
_BLOCK_MAP = tuple(
  (f"{theirs}.{a}", f"{ours}/{b}", transform)
  for theirs, ours, leaves in (
    ("self_attn.q_proj", "attn/query", _LINEAR),
    ("self_attn.k_proj", "attn/key", _LINEAR),
    ("self_attn.v_proj", "attn/value", _LINEAR),
    ("self_attn.out_proj", "attn/out", _LINEAR),
    ("layer_norm1", "norm1", _NORM),
    ("layer_norm2", "norm2", _NORM),
    ("mlp.fc1", "mlp/up", _LINEAR),
    ("mlp.fc2", "mlp/down", _LINEAR),
  )
  for a, b, transform in leaves
)
_TOP_MAP = (
  ("embeddings.token_embedding.weight", "embed/embedding", SAME),
  ("embeddings.position_embedding.weight", "position_embedding", SAME),
  ("final_layer_norm.weight", "norm/scale", SAME),
  ("final_layer_norm.bias", "norm/bias", SAME),
)
# Prefix of all tensors but the head of CLIP; versions before 5 use it for all tensors.
_PREFIX = "text_model."


def problems(text: ov_models.TextConfig) -> list[str]:
  """Return messages for fields for which the library has no text tower."""
  if (text.mask, text.pool) in KINDS:
    return []
  pairs = " or ".join(f"mask={mask!r} with pool={pool!r}" for mask, pool in KINDS)
  return [f"text.mask={text.mask!r} with text.pool={text.pool!r} (supported: {pairs})"]


def write(folder: pathlib.Path, release: Release) -> None:
  """Write config.json, model.safetensors and the tokenizer of a release with a text tower.

  Raises:
    ValueError: if there is no text tower, or the library has no class for it.
  """
  if not isinstance(release.config, ov_models.VisionLanguageConfig) or release.text is None:
    raise ValueError("this model has no text tower.")
  if found := problems(release.text):
    raise ValueError(f"transformers has no text tower with {'; '.join(found)}.")
  if release.words is None:
    raise ValueError("words=None; the text tower requires its tokenizer.")
  names = name_map(release.config)
  flat = names.to_theirs(release.params, release.config)
  folder.mkdir(parents=True, exist_ok=True)
  write_weights(folder / WEIGHTS_FILE, flat, release.dtype, names.fixed)
  write_json(folder / CONFIG_FILE, text_config(release.config, release))
  write_tokenizer(folder, release.words, template=True)


@dataclasses.dataclass(frozen=True)
class TextTower:
  """Content of a folder: the tower, E, its tensors for `name_map`, and its tokenizer."""

  config: ov_models.TextConfig
  embed_dim: int
  flat: dict[str, np.ndarray]
  words: TokenizerSpec


def read(folder: pathlib.Path, python: str | os.PathLike[str] | None = None) -> TextTower:
  """Read a folder written by `write`, or loaded and saved again by the library.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is damaged, or the architecture is incompatible; lists all differing
      fields.
  """
  content = reading.read_json(folder / CONFIG_FILE)
  config, embed_dim = _config_from(content)
  flat = {
    name if name.startswith((_PREFIX, "text_projection.")) else _PREFIX + name: tensor
    for name, tensor in reading.read_tensors(folder, (WEIGHTS_FILE,), python).items()
  }
  sizes = {"hidden_size": config.width, "intermediate_size": config.mlp_dim}
  sizes |= {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_len}
  sizes |= {"projection_size": embed_dim}
  fields.check_against_weights(flat, config.depth, sizes, str(folder / CONFIG_FILE))
  settings = reading.read_json(folder / TOKENIZER_CONFIG_FILE)
  words = tokenizer_spec_from(
    reading.read_json_text(folder / TOKENIZER_FILE, reading.MAX_TOKENIZER_BYTES), settings,
    length=config.max_len, append_cls=bool(content["openvision"]["append_cls"]),
    begins=content.get("bos_token_id") is not None,
  )  # fmt: skip
  return TextTower(config, embed_dim, flat, words)


def _config_from(content: Mapping[str, Any]) -> tuple[ov_models.TextConfig, int]:
  """Return our config and E from the content of config.json."""
  kinds = {kind: (mask, pool, embed) for (mask, pool), (kind, _, embed) in KINDS.items()}
  kind = content.get("model_type")
  about: Any = content.get("openvision")
  problems = []
  if not isinstance(kind, str) or kind not in kinds:
    problems.append(f"model_type={fields.shown(kind)} (supported: {' and '.join(kinds)})")
  problems += [
    f"{name}={fields.shown(content.get(name))} (expected {value!r})"
    for name, value in _OURS.items()
    if content.get(name) != value
  ]
  if kind == "clip_text_model" and content.get("eos_token_id") != LARGEST_ID:
    given = fields.shown(content.get("eos_token_id"))
    problems.append(f"eos_token_id={given} (expected {LARGEST_ID})")
  if not isinstance(about, Mapping) or not {"padding", "append_cls"} <= about.keys():
    problems.append(f"openvision={fields.shown(about)} (expected padding and append_cls)")
  if problems:
    raise ValueError(f"text/ is not a supported tower: {'; '.join(problems)}.")
  mask, pool, embed = kinds[str(kind)]
  integer = lambda name, high, low=1: fields.integer(
    content, name, None, high, "text/config.json: ", low
  )
  vocab_size = integer("vocab_size", fields.MAX_VOCABULARY)
  config = ov_models.TextConfig(
    width=integer("hidden_size", fields.MAX_WIDTH),
    depth=integer("num_hidden_layers", fields.MAX_DEPTH),
    mlp_dim=integer("intermediate_size", 4 * fields.MAX_WIDTH),
    num_heads=integer("num_attention_heads", fields.MAX_WIDTH),
    vocab_size=vocab_size,
    max_len=integer("max_position_embeddings", fields.MAX_TOKENS),
    mask=mask,
    pool=pool,
    padding=about["padding"],
    pad_id=integer("pad_token_id", vocab_size - 1, 0),
  )
  return config, integer(embed, fields.MAX_WIDTH)


def name_map(config: ov_models.VisionLanguageConfig) -> NameMap:
  """Return the name map of the text tower and its head.

  Args:
    config: configuration of a model with a supported text tower, see `problems`.
  """
  text = config.text
  assert text is not None
  entries = [Entry(_PREFIX + a, (f"text/{b}",), transform) for a, b, transform in _TOP_MAP]
  entries += [
    Entry(f"{_PREFIX}encoder.layers.{layer}.{a}", (f"text/blocks/{b}",), transform, layer)
    for layer in range(text.depth)
    for a, b, transform in _BLOCK_MAP
  ]
  siglip = text.mask == "full"
  head = f"{_PREFIX}head" if siglip else "text_projection"
  entries.append(Entry(f"{head}.weight", ("text_head/kernel",), TRANSPOSE))
  zeros = np.zeros(config.embed_dim, np.float32)
  return NameMap(
    "transformers",
    tuple(entries),
    (Fixed(f"{head}.bias", zeros, "the head of OpenVision has no bias"),) if siglip else (),
    (
      Dropped("encoder/", "in the folder above"),
      Dropped("image_head/kernel", "in the folder above"),
      Dropped("log_scale", "in config.json of the folder above"),
      Dropped("bias", "in config.json of the folder above"),
      Dropped("decoder/", "the library has no class for the decoder"),
    ),
    {f"{_PREFIX}embeddings.position_ids": "0, 1, 2, ..."},
  )


def text_config(config: ov_models.VisionLanguageConfig, release: Release) -> dict[str, Any]:
  """Return the content of config.json of the text tower."""
  text, words = config.text, release.words
  assert text is not None
  assert words is not None
  model_type, name, embed = KINDS[text.mask, text.pool]
  return {
    "architectures": [name],
    "model_type": model_type,
    "vocab_size": text.vocab_size,
    "hidden_size": text.width,
    "num_hidden_layers": text.depth,
    "num_attention_heads": text.num_heads,
    "intermediate_size": text.mlp_dim,
    "max_position_embeddings": text.max_len,
    embed: config.embed_dim,
    **_OURS,
    "attention_dropout": 0.0,
    "pad_token_id": text.pad_id,
    "bos_token_id": words.bos_id,
    "eos_token_id": LARGEST_ID if model_type == "clip_text_model" else words.eos_id,
    "dtype": release.dtype,
    "openvision": {"padding": text.padding, "append_cls": words.append_cls},
  }
