"""Models that earlier versions of this library saved, as the current version reads them."""

from collections.abc import Mapping
from typing import Any

# Format 1 had a class for models with a text tower and one for models without.
_FORMAT_1_KINDS = ("Captioner", "TwoTowers")


def upgrade_model(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a saved model under their current names.

  Args:
    fields: of `config_to_dict`, written by this or an earlier version.
  """
  if fields.get("kind") in _FORMAT_1_KINDS:
    return {**fields, "kind": "VisionLanguage"}
  return dict(fields)
