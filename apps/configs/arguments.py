"""Argument string of a config file: `--config=path.py:key=value,key=value`.

The grammar is that of the released code: comma-separated `key=value`; a bare key is True; a single
token that is not a key is the value of the first declared key. Values have the type of the default
and contain no comma. Aliases of keys are accepted; they log the current name.
"""

from collections.abc import Mapping
import difflib
import logging
from typing import Any

from ml_collections import ConfigDict

# "" is also false in the released code: `runlocal=` is the value of an empty shell variable.
_BOOLS = {"true": True, "false": False, "": False}


def parse_arguments(
  text: str | None,
  defaults: Mapping[str, Any],
  *,
  aliases: Mapping[str, str] | None = None,
  ignored: Mapping[str, str] | None = None,
  refused: Mapping[str, str] | None = None,
  values: Mapping[str, Mapping[str, str]] | None = None,
) -> ConfigDict:
  """Parse the text after the colon of `--config=file.py:text`.

  Args:
    text: argument string; None or "" gives the defaults.
    defaults: key -> default value; its type determines how a value is parsed.
    aliases: old key -> current key.
    ignored: key without effect -> reason; accepted with a warning.
    refused: key of another recipe -> remedy for the error message.
    values: key -> {old value: current value}.

  Returns:
    A ConfigDict with exactly the keys of `defaults`.

  Raises:
    ValueError: a key is unknown or belongs to another recipe, or a value does not have the type of
      its default.
  """
  aliases, ignored, refused = aliases or {}, ignored or {}, refused or {}
  result = dict(defaults)
  parts = [part.strip() for part in (text or "").split(",") if part.strip()]
  first = next(iter(defaults))
  known = {*defaults, *aliases, *ignored, *refused}
  if len(parts) == 1 and "=" not in parts[0] and parts[0] not in known:
    parts = [f"{first}={parts[0]}"]
  for part in parts:
    key, _, value = part.partition("=")
    key = key.strip()
    if key in refused:
      raise ValueError(f"config argument {key!r} is not an argument of this recipe: {refused[key]}")
    if key in ignored:
      logging.warning("config argument %r has no effect: %s", key, ignored[key])
      continue
    if key in aliases:
      logging.warning("config argument %r is now called %r", key, aliases[key])
      key = aliases[key]
    if key not in defaults:
      near = difflib.get_close_matches(key, known - set(refused), n=1)
      hint = f"did you mean {near[0]!r}? " if near else ""
      if not hint and "=" not in part:
        hint = "values cannot contain a comma (several names are joined with +); "
      raise ValueError(f"unknown config argument {key!r}; {hint}known: {', '.join(defaults)}")
    value = value.strip()
    if (current := (values or {}).get(key, {}).get(value)) is not None:
      logging.warning("config argument %s=%s is now called %s=%s", key, value, key, current)
      value = current
    result[key] = _read(key, value, defaults[key], bare="=" not in part)
  return ConfigDict(result)


def check_published(a: ConfigDict) -> None:
  """Check the arguments whose values have another meaning in the released code.

  Args:
    a: arguments of a recipe.

  Raises:
    ValueError: a value has no counterpart here; the message includes the remedy.
  """
  if a.get("use_openclip_tokenizer"):
    raise ValueError(
      "config argument use_openclip_tokenizer=true: no tokenizer of open_clip is built in; give "
      "the tokenizer.json of one as vocab_path"
    )
  if not a.get("img_head", True):
    raise ValueError(
      "config argument img_head=false: the image tower always has its head; leave it out, or train "
      "without a text tower with loss=cappa"
    )
  if a.init.lower() in ("true", "false"):
    raise ValueError(
      f"config argument init={a.init}: expected a path, such as init=/runs/a; init= for none"
    )


def _read(key: str, value: str, default: Any, *, bare: bool) -> Any:
  """Parse `value` as the type of `default`."""
  kind = type(default)
  if kind is bool:
    if bare:
      return True
    if value.lower() in _BOOLS:
      return _BOOLS[value.lower()]
    raise ValueError(f"config argument {key}={value!r}: expected true or false")
  if bare:
    raise ValueError(f"config argument {key!r} needs a value: {key}=<{kind.__name__}>")
  try:
    return kind(value)
  except ValueError as error:
    raise ValueError(
      f"config argument {key}={value!r}: expected {kind.__name__}, such as {default!r}"
    ) from error
