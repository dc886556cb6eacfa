"""What the value of a setting may be: a type with its limits, or a dict with named fields.

A rule is called with the name of a setting and its value, and raises ValueError with value and
expectation. Rules never convert. Their limits are those of the arithmetic behind the settings:
int32 counters, float32 arrays, and sizes that no machine can hold.
"""

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any
import unicodedata

from ml_collections import ConfigDict

from apps.trainer.names import nearest_leaf

Rule = Callable[[str, Any], None]

COUNT = 2**31 - 1  # of int32
FLOAT32 = 3.4e38  # larger numbers are Inf in float32
_LEAST = 1.2e-38  # smaller numbers may be 0 there
_ROUNDED = 6e-8  # relative: nearer numbers may be equal there
_LONGEST = 4096  # characters of a string, as of a path
_SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
  """Return a value for a message, cut where it is long."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # an integer of more than 4,300 digits
    return f"<a {type(value).__name__} too large to print>"
  return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def wrong(name: str, value: Any, expected: str) -> ValueError:
  """Return the error of a setting."""
  return ValueError(f"{name}={shown(value)}; expected {expected}")


def whole(low: int, high: int = COUNT, *, also: int | None = None) -> Rule:
  """Return the rule of integers in [low, high], and of one more."""
  other = "" if also is None else f", or {also}"

  def rule(name: str, value: Any) -> None:
    if type(value) is not int:
      raise wrong(name, value, f"a whole number of at least {low}{other}")
    if value != also and value < low:
      raise wrong(name, value, f"at least {low}{other}")
    if value != also and value > high:
      raise wrong(name, value, f"at most {high:,}{other}")

  return rule


def real(low: float, high: float = FLOAT32, *, above: bool = False, below: bool = False) -> Rule:
  """Return the rule of finite numbers in [low, high].

  Args:
    low: smallest number.
    high: largest number.
    above: refuse `low` itself, and what float32 rounds to it.
    below: refuse `high` itself, and what float32 rounds to it.
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
  """Return the rule of one of these strings."""

  def rule(name: str, value: Any) -> None:
    if type(value) is not str or value not in allowed:
      raise wrong(name, value, f"one of {', '.join(allowed)}")

  return rule


def key_of(table: Callable[[], Iterable[str]]) -> Rule:
  """Return the rule of the keys of a table, which is made when a value is checked."""
  return lambda name, value: choice(*table())(name, value)


def flag(name: str, value: Any) -> None:
  """The rule of True and False."""
  if type(value) is not bool:
    raise wrong(name, value, "True or False")


def text(name: str, value: Any) -> None:
  """The rule of strings that are names and paths."""
  if type(value) is not str:
    raise wrong(name, value, "a string")
  if len(value) > _LONGEST:
    raise wrong(name, value, f"at most {_LONGEST:,} characters")
  if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value):
    raise wrong(name, value, "a string of one line, without control characters")


def regex(name: str, value: Any) -> None:
  """The rule of regular expressions."""
  text(name, value)
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError) as error:
    raise ValueError(f"{name}={shown(value)} is no regular expression: {error}") from error


def optional(rule: Rule) -> Rule:
  """Return the rule of None and of what `rule` takes."""

  def either(name: str, value: Any) -> None:
    if value is not None:
      rule(name, value)

  return either


def several(rule: Rule, example: str) -> Rule:
  """Return the rule of tuples and lists.

  Args:
    rule: of each item.
    example: a tuple of them, for the message.
  """

  def every(name: str, value: Any) -> None:
    if not isinstance(value, tuple | list):
      raise wrong(name, value, f"a tuple, such as {example}")
    for index, item in enumerate(value):
      rule(f"{name}[{index}]", item)

  return every


def one_or_several(rule: Rule, example: str) -> Rule:
  """Return the rule of a string that `rule` takes, and of tuples of them; see `several`."""

  def either(name: str, value: Any) -> None:
    (rule if isinstance(value, str) else several(rule, example))(name, value)

  return either


def pair(first: Rule, second: Rule, example: str) -> Rule:
  """Return the rule of two values, such as `example`."""

  def rule(name: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
      raise wrong(name, value, f"a pair, such as {example}")
    first(f"{name}[0]", value[0])
    second(f"{name}[1]", value[1])

  return rule


def fields(rules: Mapping[str, Rule], *required: str) -> Rule:
  """Return the rule of dicts with these fields.

  Args:
    rules: of the fields.
    *required: fields that must be there and not be empty.
  """

  def rule(name: str, value: Any) -> None:
    if not isinstance(value, Mapping | ConfigDict):
      raise wrong(name, value, f"a dict with {', '.join(required or rules)}")
    for field, part in dict(value).items():
      if field not in rules:
        near = nearest_leaf(str(field), list(rules))
        raise ValueError(
          f"{name} has {shown(field)}; "
          + (f"did you mean {near!r}?" if near else f"it may have {', '.join(rules)}")
        )
      rules[field](f"{name}.{field}", part)
    for field in required:
      if not value.get(field):
        raise ValueError(f"{name} has no {field}; expected a dict with {', '.join(required)}")

  return rule


def plain_dict(name: str, value: Any) -> None:
  """The rule of dicts with simple values; their fields are those of another library's config."""
  if not isinstance(value, Mapping | ConfigDict):
    raise wrong(name, value, "a dict of fields, such as {'depth': 3}")
  for field, part in dict(value).items():
    text(f"a field of {name}", field)
    if type(part) is str:
      text(f"{name}.{field}", part)
    elif type(part) in (int, float):
      real(-FLOAT32)(f"{name}.{field}", part)
    elif type(part) not in (bool, type(None)):
      raise wrong(f"{name}.{field}", part, "a number, a string, or True or False")
