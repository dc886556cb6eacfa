"""Rules of options that are dataclass fields, derived from their types: towers and losses."""

from collections.abc import Mapping
import dataclasses
import typing
from typing import Any

from apps.trainer.rules import COUNT, FLOAT32, Rule, fields, integer, of_type, real

_MAX_WIDTH = 2**17  # maximum width; no other matrix dimension except the vocabulary is larger
_MAX_LAYERS = 1024
# Limits of integers and of other numbers, for fields with others than sizes and fractions.
_RULES = {
  "pad_id": (integer(0, 2**22), real(0, 1)),
  "registers": (integer(0, 4096), real(0, 1)),
  "rotary_base": (integer(1, 10**9), real(1e-3, 1e9)),
  "rotary_rescale": (integer(1, 1000), real(1, 1e3)),
}
# Fields with separate settings, which the data pipeline also uses.
_SETTINGS = {
  "image_size": "image_size",
  "vocab_size": "vocab_size",
  "max_len": "token_len (caption_len for the decoder of two towers)",
  "num_queries": "caption_len",
}


def check_options(name: str, options: Mapping[str, Any], kind: type) -> None:
  """Check the options of a tower.

  Args:
    name: name of the setting.
    options: value of the setting.
    kind: config class of ov_models whose fields they set.

  Raises:
    ValueError: a field is unknown, has the wrong type, is out of range, or is determined by another
      setting.
  """
  for field, setting in _SETTINGS.items():
    if field in options:
      raise ValueError(f"{name} has {field!r}; set config.model.{setting} instead")
  hints = typing.get_type_hints(kind)
  own = [field.name for field in dataclasses.fields(kind) if field.name not in _SETTINGS]
  fields({field: _rule(field, hints[field]) for field in own})(name, options)


def check_loss_options(name: str, options: Mapping[str, Any], kind: type) -> None:
  """Check the fields of a loss; `LossTerm.check` checks their limits.

  Args:
    name: name of the setting.
    options: value of the setting.
    kind: class in `apps.trainer.losses.LOSSES`.

  Raises:
    ValueError: a field is unknown or has the wrong type.
  """
  hints = typing.get_type_hints(kind)
  rules = {
    field.name: real(0)
    if field.name == "weight"
    else of_type(hints[field.name], integer(-COUNT), real(-FLOAT32))
    for field in dataclasses.fields(kind)
  }
  fields(rules, "weight")(name, options)


def _rule(field: str, hint: Any) -> Rule:
  if field in _RULES:
    return of_type(hint, *_RULES[field])
  largest = _MAX_LAYERS if field == "depth" else _MAX_WIDTH
  return of_type(hint, integer(1, largest), real(0, 1))
