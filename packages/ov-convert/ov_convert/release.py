"""Data structures of exported and imported models: config, parameters, preprocessing, tokenizer."""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import json
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ov_convert.name_map import Params
import ov_models
from ov_models.config import TransformerConfig, check_choice

Config = ov_models.ViTConfig | ov_models.TextConfig | ov_models.VisionLanguageConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Fit = Literal["center", "squash"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Image preprocessing; resizing is antialiased.

  Attributes:
    image_size: side of the input image S, in pixels.
    fit: "squash" resizes the whole image to a square; "center" resizes the shorter side to S and
      crops the center.
    mean, std: normalisation of the three channels in [0, 1].
    interpolation: filter of the resizing. Runs of this repository use "bilinear".

  Raises:
    ValueError: if a value is invalid.
  """

  image_size: int
  fit: Fit = "center"
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  interpolation: Interpolation = "bilinear"

  def __post_init__(self) -> None:
    check_choice("fit", self.fit, ("center", "squash"))
    check_choice("interpolation", self.interpolation, ("bilinear", "bicubic"))
    if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
      raise ValueError(
        f"mean={self.mean}, std={self.std}; expected three numbers each, std above 0."
      )


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """Conversion of texts to ids: `[bos] pieces [eos]`, truncated and padded to `length`.

  The tokenizers of SigLIP and SigLIP 2 omit [bos].

  Attributes:
    tokenizer_json: tokenizer.json of the `tokenizers` library.
    length: sequence length T, including special tokens.
    append_cls: whether the last column is [CLS], after the padding.
    pad_id, eos_id: ids of special tokens.
    bos_id: id of the first token; None if texts begin with their first piece.
    unk_id, cls_id: ids of special tokens; None if the vocabulary lacks one.
  """

  tokenizer_json: str
  length: int
  append_cls: bool
  pad_id: int
  bos_id: int | None
  eos_id: int
  unk_id: int | None = None
  cls_id: int | None = None

  @functools.cached_property
  def vocabulary(self) -> dict[str, int]:
    """Ids by token, including added tokens."""
    content = json.loads(self.tokenizer_json)
    pieces = content["model"]["vocab"]
    if isinstance(pieces, list):  # Unigram: pairs of piece and score
      pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    vocabulary: dict[str, int] = dict(pieces)
    return vocabulary | {t["content"]: t["id"] for t in content.get("added_tokens", [])}

  def token(self, number: int | None) -> str | None:
    """Return the token of an id, or None."""
    return next((t for t, i in self.vocabulary.items() if i == number), None)


@dataclasses.dataclass(frozen=True)
class Release:
  """Model to be exported.

  Attributes:
    config: configuration of the model, at the resolution of `preprocess`; see `portable`.
    params: parameters as float32 on the host, rounded to `dtype`.
    preprocess: image preprocessing.
    words: tokenizer of the text tower, or of the decoder if there is no text tower; None without
      either.
    dtype: dtype of the files: "float32", "bfloat16" or "float16".
  """

  config: Config
  params: Params
  preprocess: Preprocess
  words: TokenizerSpec | None = None
  dtype: str = "float32"

  @property
  def encoder(self) -> ov_models.ViTConfig:
    """Configuration of the image tower; raises ValueError if there is none."""
    return encoder_of(self.config)

  @property
  def text(self) -> ov_models.TextConfig | None:
    """Configuration of the text tower, or None."""
    return getattr(self.config, "text", None)

  @property
  def image_params(self) -> Params:
    """Parameters of the image tower for `ov_models.bind(release.encoder, ...)`."""
    return self.params if isinstance(self.config, ov_models.ViTConfig) else self.params["encoder"]


@dataclasses.dataclass(frozen=True)
class Imported:
  """Imported model; `notes` list what was changed or omitted."""

  config: Config
  params: Params
  preprocess: Preprocess | None = None
  words: TokenizerSpec | None = None
  notes: tuple[str, ...] = ()


def encoder_of(config: Config) -> ov_models.ViTConfig:
  """Return the config of the image tower; raise ValueError if there is none."""
  if isinstance(config, ov_models.TextConfig):
    raise ValueError("a text tower alone has no image tower; export it with its image tower.")
  return config if isinstance(config, ov_models.ViTConfig) else config.encoder


# Fields that every format handles itself: sizes, and options that formats check one by one.
_NOT_OPTIONS = frozenset(
  {
    "width", "depth", "mlp_dim", "num_heads", "dtype", "remat", "attention", "scan", "patch_size",
    "image_size", "position", "position_resize", "pool", "mask_ratio", "mask_mode", "drop_path",
    "drop_path_rule", "rotary_rescale", "vocab_size", "max_len", "mask", "padding", "pad_id",
    "embed_dim",
    "log_scale_init", "bias_init", "encoder", "text", "decoder", "parallel_ratio", "keep_ratio",
    "keep_order", "eval_keep", "num_queries", "parallel",
  }
)  # fmt: skip


def option_problems(config: Config, supported: Collection[str] = ()) -> list[str]:
  """Return the options of a model that differ from those of OpenVision.

  Args:
    config: configuration of the model.
    supported: names of fields that the caller represents, such as "encoder.pre_norm".

  Returns:
    Messages such as "encoder.pre_norm=True".
  """
  encoder = None if isinstance(config, ov_models.TextConfig) else encoder_of(config)
  parts: list[tuple[str, Any]] = [("text.", config) if encoder is None else ("encoder.", encoder)]
  if isinstance(config, ov_models.VisionLanguageConfig):
    parts += [("", config)]
    parts += [(f"{n}.", p) for n in ("text", "decoder") if (p := getattr(config, n)) is not None]
  found = [
    f"{prefix}{field.name}={value!r}"
    for prefix, part in parts
    for field in dataclasses.fields(part)
    if field.name not in _NOT_OPTIONS and prefix + field.name not in supported
    if (value := getattr(part, field.name)) != field.default
  ]
  for name, plain in (("pool", ("gap", "tok", "map")), ("position", ("sincos2d", "learned"))):
    value = getattr(encoder, name, None)
    if value not in (None, *plain) and f"encoder.{name}" not in supported:
      found.append(f"encoder.{name}={value!r}")
  return found


def check_options(config: Config, library: str, supported: Collection[str] = ()) -> None:
  """Raise ValueError if a model has options that a library does not support; lists all of them."""
  if found := option_problems(config, supported):
    raise ValueError(
      f"{library} does not support {', '.join(found)}; export to the library that the model comes "
      "from, or as stablehlo."
    )


def portable(config: Any) -> Any:
  """Return the config with portable options: float32, XLA attention, no rematerialisation."""
  changes: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    if dataclasses.is_dataclass(value := getattr(config, field.name)):
      changes[field.name] = portable(value)
  if isinstance(config, TransformerConfig):
    changes |= {"dtype": "float32", "remat": "none", "attention": "xla"}
  return dataclasses.replace(config, **changes)


def round_params(params: Params, dtype: str) -> Params:
  """Return the parameters rounded to `dtype`, as float32."""

  def leaf(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {name: leaf(child) for name, child in value.items()}
    return np.asarray(value, np.float32).astype(jnp.dtype(dtype)).astype(np.float32)

  return leaf(params)
