"""Rules of the options of a tower: the fields of its config in ov_models, by their types."""

from collections.abc import Mapping
import dataclasses
import typing
from typing import Any

from apps.trainer.rules import Rule, choice, fields, flag, real, whole

_LARGEST = 2**17  # of a width; no matrix of a model has a larger side, except by vocabulary
_MOST_LAYERS = 1024
# Fields that belong to settings of their own, which the data follow too.
_SETTINGS = {
  "image_size": "image_size",
  "vocab_size": "vocab_size",
  "max_len": "token_len (caption_len for the decoder of two towers)",
  "num_queries": "caption_len",
}


def check_options(name: str, options: Mapping[str, Any], kind: type) -> None:
  """Check the options of a tower.

  Args:
    name: of the setting.
    options: its value.
    kind: a config of ov_models, whose fields they are.

  Raises:
    ValueError: an unknown field, a value of another type or out of range, or a field that another
      setting decides.
  """
  for field, setting in _SETTINGS.items():
    if field in options:
      raise ValueError(f"{name} has {field!r}; set config.model.{setting} instead")
  hints = typing.get_type_hints(kind)
  own = [field.name for field in dataclasses.fields(kind) if field.name not in _SETTINGS]
  fields({field: _rule(field, hints[field]) for field in own})(name, options)


def _rule(field: str, hint: Any) -> Rule:
  if typing.get_origin(hint) is typing.Literal:
    return choice(*typing.get_args(hint))
  if hint is bool:
    return flag
  if hint is float:
    return real(0, 1)
  assert hint is int, f"no rule for {field} of type {hint}"
  if field == "pad_id":
    return whole(0, 2**22)
  return whole(1, _MOST_LAYERS if field == "depth" else _LARGEST)
