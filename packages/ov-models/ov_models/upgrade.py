"""Conversion of model configs that earlier versions of this library saved."""

from collections.abc import Mapping
from typing import Any

# Format 1 had separate classes for models with and without a text tower.
_FORMAT_1_KINDS = ("Captioner", "TwoTowers")


def upgrade_model(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a saved config in the current format.

  Args:
    fields: result of `config_to_dict` of this or an earlier version.
  """
  if fields.get("kind") in _FORMAT_1_KINDS:
    return {**fields, "kind": "VisionLanguage"}
  return dict(fields)
