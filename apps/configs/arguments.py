"""The argument string of a config file: `--config=path.py:key=value,key=value`.

The grammar is the one OpenVision users know: comma-separated `key=value`, a bare key is True,
and a single token that is no key is the value of the first declared key. Values take the type of
the default. A key may have older spellings; these still work and say what the current name is.
"""

from collections.abc import Mapping
import difflib
import logging
from typing import Any

from ml_collections import ConfigDict

_TRUE, _FALSE = ("true", "1", ""), ("false", "0")


def parse_arguments(
  text: str | None,
  defaults: Mapping[str, Any],
  *,
  aliases: Mapping[str, str] | None = None,
  ignored: Mapping[str, str] | None = None,
) -> ConfigDict:
  """Parses the text after the colon of `--config=file.py:text`.

  Args:
    text: the argument string; None or "" gives the defaults.
    defaults: key -> default value; the type of the default decides how a value is read.
    aliases: older spelling -> current key.
    ignored: key -> why it no longer does anything; accepted with a warning.

  Returns:
    A ConfigDict with exactly the keys of `defaults`.

  Raises:
    ValueError: unknown key, or a value that cannot be read as the type of its default.
  """
  aliases, ignored = aliases or {}, ignored or {}
  values = dict(defaults)
  parts = [part.strip() for part in (text or "").split(",") if part.strip()]
  first = next(iter(defaults))
  known = set(defaults) | set(aliases) | set(ignored)
  if len(parts) == 1 and "=" not in parts[0] and parts[0] not in known:
    parts = [f"{first}={parts[0]}"]
  for part in parts:
    key, _, value = part.partition("=")
    key = key.strip()
    if key in ignored:
      logging.warning("config argument %r has no effect: %s", key, ignored[key])
      continue
    if key in aliases:
      logging.warning("config argument %r is now called %r", key, aliases[key])
      key = aliases[key]
    if key not in defaults:
      near = difflib.get_close_matches(key, known, n=1)
      hint = f"did you mean {near[0]!r}? " if near else ""
      raise ValueError(f"unknown config argument {key!r}; {hint}known: {', '.join(defaults)}")
    values[key] = _read(key, value.strip(), defaults[key], bare="=" not in part)
  return ConfigDict(values)


def _read(key: str, value: str, default: Any, *, bare: bool) -> Any:
  """Reads `value` as the type of `default`."""
  kind = type(default)
  if kind is bool:
    if bare or value.lower() in _TRUE:
      return True
    if value.lower() in _FALSE:
      return False
    raise ValueError(f"config argument {key}={value!r}: expected true or false")
  if bare:
    raise ValueError(f"config argument {key!r} needs a value: {key}=<{kind.__name__}>")
  try:
    return kind(value)
  except ValueError as error:
    raise ValueError(
      f"config argument {key}={value!r}: expected {kind.__name__}, such as {default!r}"
    ) from error
