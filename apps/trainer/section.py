"""Frozen dataclasses of settings, parsed from nested dicts with a rule for each field."""

from collections.abc import Mapping
import dataclasses
import typing
from typing import Any, Self

from apps.trainer.names import leaves, nearest_leaf
from apps.trainer.rules import Rule, choice, shown, wrong


def setting(default: Any, rule: Rule | None = None) -> Any:
  """Return the dataclass field of a setting.

  Args:
    default: default value.
    rule: rule of its values; None for a `Literal`, whose values are the valid ones.
  """
  if isinstance(default, dict):
    return dataclasses.field(default_factory=dict, metadata={"rule": rule})
  return dataclasses.field(default=default, metadata={"rule": rule})


@dataclasses.dataclass(frozen=True)
class Section:
  """Base class of a group of settings."""

  @classmethod
  def parse(cls, tree: Any, where: str = "config.", path: str = "") -> Self:
    """Return the section with these values, and defaults for all others.

    Args:
      tree: settings by name, sections as dicts.
      where: prefix of the names of settings in messages.
      path: path of the section in the whole tree.

    Raises:
      ValueError: a setting is unknown, has the wrong type or is out of range.
    """
    if not isinstance(tree, Mapping):
      raise wrong(f"{where}{path}".rstrip("."), tree, "a section of settings")
    given = dict(tree)
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
      if field.name not in given:
        continue
      value, name = given.pop(field.name), f"{path}.{field.name}".lstrip(".")
      if is_section(kind := hints[field.name]):
        values[field.name] = kind.parse(value, where, name)
      else:
        rule_of(field, kind)(f"{where}{name}", value)
        values[field.name] = _converted(value, kind)
    for unknown in given:
      near = nearest_leaf(str(unknown), [field.name for field in dataclasses.fields(cls)])
      raise ValueError(
        f"{where}{path}{'.' if path else ''}{unknown}: unknown setting; "
        + (f"did you mean {near!r}?" if near else "apps/trainer/run_config.py lists all")
      )
    return cls(**values)

  def to_dict(self) -> dict[str, Any]:
    """Return the settings by name, sections as dicts."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {k: v.to_dict() if isinstance(v, Section) else v for k, v in values.items()}

  def with_settings(self, changes: Mapping[str, Any], where: str = "config.") -> Self:
    """Return a copy with other values.

    Args:
      changes: dotted name of a setting -> value.
      where: see `parse`.

    Raises:
      ValueError: a setting is unknown, has the wrong type or is out of range.
    """
    tree = _plain(self.to_dict())
    known = list(leaves(tree))
    for name, value in changes.items():
      if name not in known:
        near = nearest_leaf(str(name), known)
        raise ValueError(
          f"{where}unknown setting {shown(name)}; "
          + (f"did you mean {near!r}?" if near else "apps/trainer/run_config.py lists all")
        )
      *sections, last = name.split(".")
      section = tree
      for part in sections:
        section = section[part]
      section[last] = value
    return type(self).parse(tree, where)


def rule_of(field: dataclasses.Field[Any], hint: Any) -> Rule:
  """Return the rule of the setting in a field with this type."""
  return field.metadata["rule"] or choice(*typing.get_args(hint))


def is_section(kind: Any) -> bool:
  """Return whether the type of a field is a section."""
  return isinstance(kind, type) and issubclass(kind, Section)


def _converted(value: Any, kind: Any) -> Any:
  """Return a checked value converted to the type of its field."""
  if typing.get_origin(kind) is tuple:
    return tuple(_plain(item) for item in value)
  if float in (kind, *typing.get_args(kind)) and type(value) is int:
    return float(value)
  return _plain(value)


def _plain(value: Any) -> Any:
  """Convert nested mappings to dicts."""
  return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
