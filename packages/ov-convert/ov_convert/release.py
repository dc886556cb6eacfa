"""What leaves and what enters: a model with all that is needed to use it, and nothing of a run."""

from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """How a picture becomes the input of the image tower; always bilinear and antialiased.

  Attributes:
    image_size: S, pixels a side.
    fit: "squash" stretches the whole picture; "center" brings the shorter side to S and keeps the
      middle.
    mean, std: of normalisation, for the three channels in [0, 1].

  Raises:
    ValueError: values that are none of these.
  """

  image_size: int
  fit: Fit = "center"
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD

  def __post_init__(self) -> None:
    check_choice("fit", self.fit, ("center", "squash"))
    if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
      raise ValueError(
        f"mean={self.mean}, std={self.std}; expected three numbers each, std above 0."
      )


@dataclasses.dataclass(frozen=True)
class Words:
  """How a text becomes ids: `[bos] pieces [eos]`, cut and padded to `length`.

  Attributes:
    tokenizer_json: of the `tokenizers` library; makes the pieces.
    length: T, all special tokens included.
    append_cls: whether the last column is [CLS], behind the padding.
    pad_id, bos_id, eos_id, unk_id, cls_id: None where the vocabulary has none.
  """

  tokenizer_json: str
  length: int
  append_cls: bool
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int | None = None
  cls_id: int | None = None

  @functools.cached_property
  def vocabulary(self) -> dict[str, int]:
    """Token -> id, added tokens included."""
    content = json.loads(self.tokenizer_json)
    pieces = content["model"]["vocab"]
    if isinstance(pieces, list):  # of Unigram, with their scores
      pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    vocabulary: dict[str, int] = dict(pieces)
    return vocabulary | {t["content"]: t["id"] for t in content.get("added_tokens", [])}

  def token(self, number: int | None) -> str | None:
    """The token of an id."""
    return next((t for t, i in self.vocabulary.items() if i == number), None)


@dataclasses.dataclass(frozen=True)
class Release:
  """A model to be written in somebody's format.

  Attributes:
    config: of the model, at the resolution of `preprocess`; `portable`.
    params: float32, on the host, rounded to `dtype`.
    preprocess: of pictures.
    words: of the texts of the text tower, or else of the decoder; None without either.
    dtype: of the files: "float32", "bfloat16" or "float16".
  """

  config: Config
  params: Params
  preprocess: Preprocess
  words: Words | None = None
  dtype: str = "float32"

  @property
  def encoder(self) -> ov_models.ViTConfig:
    """The image tower; ValueError for a model without one."""
    return encoder_of(self.config)

  @property
  def text(self) -> ov_models.TextConfig | None:
    """The text tower, if there is one."""
    return getattr(self.config, "text", None)

  @property
  def image_params(self) -> Params:
    """Parameters of the image tower, for `ov_models.bind(release.encoder, ...)`."""
    return self.params if isinstance(self.config, ov_models.ViTConfig) else self.params["encoder"]


@dataclasses.dataclass(frozen=True)
class Imported:
  """A model read from somebody's format; `notes` say what was changed or left out on the way."""

  config: Config
  params: Params
  preprocess: Preprocess | None = None
  words: Words | None = None
  notes: tuple[str, ...] = ()


def encoder_of(config: Config) -> ov_models.ViTConfig:
  """The image tower of a model; ValueError for one without."""
  if isinstance(config, ov_models.TextConfig):
    raise ValueError("a text tower alone has no image tower; export it with its image tower.")
  return config if isinstance(config, ov_models.ViTConfig) else config.encoder


def portable(config: Any) -> Any:
  """The config with what runs on any machine: float32, plain attention, nothing rematerialised."""
  changes: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    if dataclasses.is_dataclass(value := getattr(config, field.name)):
      changes[field.name] = portable(value)
  if isinstance(config, TransformerConfig):
    changes |= {"dtype": "float32", "remat": "none", "attention": "xla"}
  return dataclasses.replace(config, **changes)


def round_params(params: Params, dtype: str) -> Params:
  """The parameters as a file of `dtype` keeps them, as float32."""

  def leaf(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {name: leaf(child) for name, child in value.items()}
    return np.asarray(value, np.float32).astype(jnp.dtype(dtype)).astype(np.float32)

  return leaf(params)
