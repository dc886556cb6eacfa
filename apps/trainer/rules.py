"""Rules for the values of settings: types with limits, and dicts with named fields.

A rule takes the name of a setting and its value, and raises ValueError with value and expectation.
Rules never convert values. Their limits are those of the arithmetic: int32 counters, float32
arrays, and sizes that no machine can hold. msgspec, which parses checkpoints, would check types and
ranges too, but its messages do not contain the value.
"""

from collections.abc import Callable, Mapping
import re
import typing
from typing import Any
import unicodedata

from apps.trainer.names import nearest_leaf

Rule = Callable[[str, Any], None]

COUNT = 2**31 - 1  # maximum of int32
FLOAT32 = 3.4e38  # larger numbers overflow to Inf in float32
_LEAST = 1.2e-38  # smaller numbers may underflow to 0
_ROUNDED = 6e-8  # relative; closer numbers may be equal in float32
_LONGEST = 4096  # maximum characters of a string, such as a path
_SHOWN = 80  # maximum characters of a value in a message


def shown(value: Any) -> str:
  """Return a value for a message, shortened if long."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # an integer of more than 4,300 digits
    return f"<a {type(value).__name__} too large to print>"
  return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def wrong(name: str, value: Any, expected: str) -> ValueError:
  """Return the error for the value of a setting."""
  return ValueError(f"{name}={shown(value)}; expected {expected}")


def integer(low: int, high: int = COUNT, *, also: int | None = None) -> Rule:
  """Return the rule of integers in [low, high], plus the value `also`."""
  other = "" if also is None else f", or {also}"

  def rule(name: str, value: Any) -> None:
    if type(value) is not int:
      raise wrong(name, value, f"an integer of at least {low}{other}")
    if value != also and value < low:
      raise wrong(name, value, f"at least {low}{other}")
    if value != also and value > high:
      raise wrong(name, value, f"at most {high:,}{other}")

  return rule


def real(low: float, high: float = FLOAT32, *, above: bool = False, below: bool = False) -> Rule:
  """Return the rule of finite numbers in [low, high].

  Args:
    low: lower limit.
    high: upper limit.
    above: exclude `low`, and values that float32 rounds to it.
    below: exclude `high`, and values that float32 rounds to it.
  """
  least = low + max(abs(low) * _ROUNDED, _LEAST) if above else low
  most = high - abs(high) * _ROUNDED if below else high
  expected = f"in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
  if high == FLOAT32:
    expected = f"above {low:g}" if above else f"of at least {low:g}"

  def rule(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not least <= value <= most:  # NaN included
      raise wrong(name, value, f"a finite number {expected}")

  return rule


def choice(*allowed: str) -> Rule:
  """Return the rule of a string that is one of `allowed`."""

  def rule(name: str, value: Any) -> None:
    if type(value) is not str or value not in allowed:
      raise wrong(name, value, f"one of {', '.join(allowed)}")

  return rule


def flag(name: str, value: Any) -> None:
  """Check that a value is True or False."""
  if type(value) is not bool:
    raise wrong(name, value, "True or False")


def text(name: str, value: Any) -> None:
  """Check that a value is a string for a name or a path."""
  if type(value) is not str:
    raise wrong(name, value, "a string")
  if len(value) > _LONGEST:
    raise wrong(name, value, f"at most {_LONGEST:,} characters")
  if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value):
    raise wrong(name, value, "a string of one line, without control characters")


def regex(name: str, value: Any) -> None:
  """Check that a value is a regular expression."""
  text(name, value)
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError) as error:
    raise ValueError(f"{name}={shown(value)} is not a valid regular expression: {error}") from error


def optional(rule: Rule) -> Rule:
  """Return the rule of None and of values that follow `rule`."""

  def either(name: str, value: Any) -> None:
    if value is not None:
      rule(name, value)

  return either


def several(rule: Rule, example: str) -> Rule:
  """Return the rule of tuples and lists.

  Args:
    rule: rule of each item.
    example: example of a valid tuple, for the message.
  """

  def every(name: str, value: Any) -> None:
    if not isinstance(value, tuple | list):
      raise wrong(name, value, f"a tuple, such as {example}")
    for index, item in enumerate(value):
      rule(f"{name}[{index}]", item)

  return every


def exactly(count: int, rule: Rule, example: str) -> Rule:
  """Return the rule of tuples of `count` items that follow `rule`; see `several`."""
  every = several(rule, example)

  def items(name: str, value: Any) -> None:
    every(name, value)
    if len(value) != count:
      raise wrong(name, value, f"{count} values, such as {example}")

  return items


def one_or_several(rule: Rule, example: str) -> Rule:
  """Return the rule of a string that follows `rule`, or a tuple of them; see `several`."""

  def either(name: str, value: Any) -> None:
    (rule if isinstance(value, str) else several(rule, example))(name, value)

  return either


def pair(first: Rule, second: Rule, example: str) -> Rule:
  """Return the rule of pairs, such as `example`."""

  def rule(name: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
      raise wrong(name, value, f"a pair, such as {example}")
    first(f"{name}[0]", value[0])
    second(f"{name}[1]", value[1])

  return rule


def fields(rules: Mapping[str, Rule], *required: str) -> Rule:
  """Return the rule of dicts with these fields.

  Args:
    rules: rules of the fields.
    *required: required, non-empty fields.
  """

  def rule(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
      raise wrong(name, value, f"a dict with {', '.join(required or rules)}")
    for field, part in dict(value).items():
      if field not in rules:
        near = nearest_leaf(str(field), list(rules))
        raise ValueError(
          f"{name} has {shown(field)}; "
          + (f"did you mean {near!r}?" if near else f"valid fields are {', '.join(rules)}")
        )
      rules[field](f"{name}.{field}", part)
    for field in required:
      if not value.get(field):
        raise ValueError(f"{name} has no {field}; expected a dict with {', '.join(required)}")

  return rule


def of_type(hint: Any, integer: Rule, number: Rule) -> Rule:
  """Return the rule of the values of a dataclass field.

  Args:
    hint: type of the field: bool, int, float, str, a Literal of strings, or one of them or None.
    integer: rule of int values.
    number: rule of float values.
  """
  if type(None) in (parts := typing.get_args(hint)):
    (kind,) = (part for part in parts if part is not type(None))
    return optional(of_type(kind, integer, number))
  if typing.get_origin(hint) is typing.Literal:
    return choice(*parts)
  return {bool: flag, int: integer, float: number, str: text}[hint]


def dicts(name: str, value: Any) -> None:
  """Check that a value is a dict whose values follow `plain_dict`."""
  if not isinstance(value, Mapping):
    raise wrong(name, value, "a dict of dicts, such as {'NAME': {'weight': 1.0}}")
  for field, part in dict(value).items():
    text(f"a field of {name}", field)
    plain_dict(f"{name}.{field}", part)


def plain_dict(name: str, value: Any) -> None:
  """Check that a value is a dict of simple values, the fields of another library's config."""
  if not isinstance(value, Mapping):
    raise wrong(name, value, "a dict of fields, such as {'depth': 3}")
  for field, part in dict(value).items():
    text(f"a field of {name}", field)
    if type(part) is str:
      text(f"{name}.{field}", part)
    elif type(part) in (int, float):
      real(-FLOAT32)(f"{name}.{field}", part)
    elif type(part) not in (bool, type(None)):
      raise wrong(f"{name}.{field}", part, "a number, a string, or True or False")
