"""Declarative description of a model family of another library.

A `Family` lists the fields of its configuration and the names of its tensors, each with its
counterpart in ov_models. "Theirs" is the other library, "ours" is ov_models. A family is used in
both directions. A field without counterpart is an error that names it. A config of ov_models fits a
family if it is unchanged by writing and reading it again.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from ov_convert import fields as fields_lib
from ov_convert.name_map import SAME, TRANSPOSE, Entry, NameMap, Transform, flatten
from ov_convert.release import Config, encoder_of, portable
import ov_models

# Name of their tensor, with "{layer}" for the number of a block; paths of our tensors; transform.
# Our paths start with "encoder/" or "text/" for the parameters of a tower.
Line = tuple[str, tuple[str, ...], Transform]

# Fields of every configuration of transformers that do not affect a forward pass of an encoder, or
# describe the generation of text.
GENERIC = frozenset(
  {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "transformers.js_config", "typical_p", "use_bfloat16", "use_cache",
    # Dropout has no effect outside of training.
    "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout_prob", "dropout",
    "drop_path_rate", "projection_dropout",
  }
)  # fmt: skip

SIZE = "size"
NUMBER = "number"


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of the other library and our field with the same meaning.

  Attributes:
    theirs: name of their field.
    ours: name of our field.
    default: value of a missing field in their library; None if it is required.
    kind: SIZE, NUMBER, or a mapping from their values to ours.
    high: largest size.
    low: smallest size.
  """

  theirs: str
  ours: str
  default: Any = None
  kind: str | Mapping[Any, Any] = SIZE
  high: int = fields_lib.MAX_WIDTH
  low: int = 1

  def read(self, content: Mapping[str, Any], where: str) -> Any:
    """Return our value; raise ValueError that names the field and the value."""
    if isinstance(self.kind, Mapping):
      value = content.get(self.theirs, self.default)
      if not isinstance(value, str | bool | int | type(None)) or value not in self.kind:
        known = " or ".join(repr(key) for key in self.kind)
        raise ValueError(f"{where}{self.theirs}={fields_lib.shown(value)} (supported: {known})")
      return self.kind[value]
    if self.kind == NUMBER:
      return fields_lib.number(content, self.theirs, self.default, where)
    side = content.get(self.theirs, self.default)
    if isinstance(side, list | tuple) and len(side) == 2 and side[0] == side[1]:
      side = side[0]
    return fields_lib.integer({self.theirs: side}, self.theirs, None, self.high, where, self.low)

  def write(self, value: Any) -> Any:
    """Return their value; their default if there is none for `value`."""
    if isinstance(self.kind, Mapping):
      return next((key for key, ours in self.kind.items() if ours == value), self.default)
    return value


@dataclasses.dataclass(frozen=True)
class Section:
  """The fields of one part of a model.

  Attributes:
    part: "encoder", "text", or "model" for those of both towers.
    path: object of the configuration with these fields; "" for the top level.
    fields: fields with a counterpart.
    ours: values of our other fields.
    required: their fields with the only value that ours represents, which is also the default
      of their library.
    unused: their fields that do not affect the model, in addition to GENERIC.
    derive: returns our further fields from their fields; raises ValueError that names a field.
    extra: returns their further fields for our config of the complete model.
  """

  part: str
  path: str
  fields: tuple[Field, ...]
  ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  unused: frozenset[str] = frozenset()
  derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
  extra: Callable[[Any], Mapping[str, Any]] | None = None

  def read(self, content: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return our fields; add messages on fields without counterpart to `problems`."""
    prefix = f"{self.path}." if self.path else ""
    found = dict(self.ours)
    for field in self.fields:
      try:
        found[field.ours] = field.read(content, prefix)
      except ValueError as error:
        problems.append(str(error).rstrip("."))
    problems += [
      f"{prefix}{name}={fields_lib.shown(content[name])} (supported: {value!r})"
      for name, value in self.required.items()
      if name in content and content[name] != value
    ]
    known = {field.theirs for field in self.fields} | {*self.required} | self.unused | GENERIC
    known |= {"vision_config", "text_config", "vision_config_dict", "text_config_dict"}
    problems += [
      f"{prefix}{name}={fields_lib.shown(value)} (unknown)"
      for name, value in sorted(content.items())
      if name not in known and value not in (None, False, 0, "")
    ]
    if self.derive is not None:
      try:
        found |= self.derive(content)
      except ValueError as error:
        problems.append(prefix + str(error).rstrip("."))
    return found

  def write(self, config: Any) -> dict[str, Any]:
    """Return their fields for a config of the complete model."""
    part = _part(config, self.part)
    ours = {field.theirs: field.write(getattr(part, field.ours)) for field in self.fields}
    extra = {} if self.extra is None else self.extra(config)
    return {**self.required, **ours, **extra}


@dataclasses.dataclass(frozen=True)
class Family:
  """A class of models of another library.

  Attributes:
    name: name for messages.
    model_type: value that identifies the class in a configuration.
    architecture: class that loads the model.
    sections: parts of the configuration. With a section of "model", there are two towers.
    lines: all tensors; those without counterpart in a model are left out.
    renames: regular expressions of names in other versions of the library, with the name here.
    ignored: tensors that are not read, with the reason.
    zeros: returns the tensors that are written as zeros and not read, by name, with their shapes.
    applies: whether a configuration of this `model_type` is of this family.
    defaults: further fields that are written.
  """

  name: str
  model_type: str
  architecture: str
  sections: tuple[Section, ...]
  lines: tuple[Line, ...]
  renames: tuple[tuple[str, str], ...] = ()
  ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
  zeros: Callable[[Config], Mapping[str, tuple[int, ...]]] | None = None
  applies: Callable[[Mapping[str, Any]], bool] = lambda content: True
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def joint(self) -> bool:
    """Whether the model has two towers."""
    return any(section.part == "model" for section in self.sections)

  def read_config(self, content: Mapping[str, Any], where: str) -> Config:
    """Return our config of a model.

    Raises:
      ValueError: if fields have no counterpart; the message, one line, names all of them.
    """
    problems: list[str] = []
    parts: dict[str, dict[str, Any]] = {}
    for section in self.sections:
      given = content
      if section.path:  # old files have a second object, which takes precedence
        second = fields_lib.section(content, f"{section.path}_dict", where)
        given = {**fields_lib.section(content, section.path, where), **second}
      parts.setdefault(section.part, {}).update(section.read(given, problems))
    if problems:
      raise ValueError(f"{where}this {self.name} model is not supported: {'; '.join(problems)}.")
    try:
      encoder = ov_models.ViTConfig(**parts["encoder"])
      if not self.joint:
        return encoder
      text = ov_models.TextConfig(**parts["text"])
      return ov_models.VisionLanguageConfig(encoder=encoder, text=text, **parts["model"])
    except ValueError as error:
      raise ValueError(f"{where}{error}") from None

  def write_config(self, config: Config) -> dict[str, Any]:
    """Return the content of their configuration, without checking `problems`."""
    content: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
    content |= self.defaults
    for section in self.sections:
      found = section.write(config)
      target = content.setdefault(section.path, {}) if section.path else content
      target.update(found)
    return content

  def problems(self, config: Config) -> list[str]:
    """Return the fields of a config that the family does not represent."""
    if isinstance(config, ov_models.TextConfig):
      return ["a text tower alone"]
    if getattr(config, "decoder", None) is not None:
      return ["decoder (there is none in this family)"]
    if self.joint != (getattr(config, "text", None) is not None):
      return [f"text (the family has {'a' if self.joint else 'no'} text tower)"]
    config = inference(config)
    if not self.joint:
      config = encoder_of(config)
    content = self.write_config(config)
    if not self.applies(content):
      return ["mlp (another variant of the family has it)"]
    try:
      back = inference(self.read_config(content, ""))
    except ValueError as error:
      return [str(error)]
    return list(_differences(config, back, ""))

  def name_map(self, config: Config) -> NameMap:
    """Return the name map of a config without `problems`."""
    alone = isinstance(config, ov_models.ViTConfig)
    shapes = flatten(ov_models.abstract_params(config))
    entries = tuple(
      entry for line in self.lines for entry in _entries(line, shapes, "encoder/" if alone else "")
    )
    return NameMap(self.name, entries, (), (), self.ignored)

  def rename(self, name: str) -> str:
    """Return the name in `lines` of a tensor of any version of the library."""
    for pattern, replacement in self.renames:
      name = re.sub(pattern, replacement, name)
    return name

  def canonical(self, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors under the names of `lines`.

    Raises:
      ValueError: if two tensors have the same name then.
    """
    found: dict[str, np.ndarray] = {}
    for name, tensor in flat.items():
      if not tensor.size:  # register tokens of a model without registers
        continue
      known = self.rename(name)
      if known in found:
        raise ValueError(f"the weights contain {known} twice, the second time as {name}; keep one.")
      found[known] = tensor
    return found


def dense(theirs: str, *ours: str) -> tuple[Line, ...]:
  """Return the lines of a dense layer; several of our layers are concatenated along the outputs."""
  return (
    (f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours), TRANSPOSE),
    (f"{theirs}.bias", tuple(f"{path}/bias" for path in ours), SAME),
  )


def norm(theirs: str, ours: str) -> tuple[Line, ...]:
  """Return the lines of a norm."""
  return (
    (f"{theirs}.weight", (f"{ours}/scale",), SAME),
    (f"{theirs}.bias", (f"{ours}/bias",), SAME),
  )


def inference(config: Any) -> Any:
  """Return a config without options that only affect training or speed."""
  changes: dict[str, Any] = {}
  for field in dataclasses.fields(config := portable(config)):
    if dataclasses.is_dataclass(value := getattr(config, field.name)):
      changes[field.name] = inference(value)
  if isinstance(config, ov_models.ViTConfig):
    changes |= {"drop_path": 0.0, "drop_path_rule": "linear", "mask_ratio": 0.0, "scan": True}
    changes |= {"mask_mode": "random", "rotary_rescale": None, "position_resize": "bilinear"}
    if config.layer_scale is not None:
      changes["layer_scale"] = 1.0  # initial value
    if config.pool in ("map", "attend"):
      changes["pool_heads"] = config.pool_config.num_heads
    if config.pool == "map":
      changes["pool_mlp_dim"] = config.pool_config.mlp_dim
  if isinstance(config, ov_models.TextConfig):
    changes |= {"scan": True}
    if config.padding == "attend":
      changes["pad_id"] = 0  # has no effect
  if isinstance(config, ov_models.VisionLanguageConfig):
    bias = None if config.bias_init is None else 0.0
    changes |= {"log_scale_init": 0.0, "bias_init": bias}  # initial values
  return dataclasses.replace(config, **changes)


def _part(config: Any, part: str) -> Any:
  if part == "model" or (part == "encoder" and isinstance(config, ov_models.ViTConfig)):
    return config
  return getattr(config, part)


def _differences(ours: Any, theirs: Any, prefix: str) -> Iterator[str]:
  for field in dataclasses.fields(ours):
    a, b = getattr(ours, field.name), getattr(theirs, field.name)
    if dataclasses.is_dataclass(a):
      yield from _differences(a, b, f"{prefix}{field.name}.")
    elif a != b:
      yield f"{prefix}{field.name}={a!r} (supported: {b!r})"


def _entries(line: Line, shapes: Mapping[str, Any], drop: str) -> Iterator[Entry]:
  theirs, paths, transform = line
  ours = tuple(path.removeprefix(drop) for path in paths)
  if not all(path in shapes for path in ours):
    return
  if "{layer}" not in theirs:
    yield Entry(theirs, ours, transform)
    return
  for layer in range(shapes[ours[0]].shape[0]):
    yield Entry(theirs.replace("{layer}", str(layer)), ours, transform, layer)
