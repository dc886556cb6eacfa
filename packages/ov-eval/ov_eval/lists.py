"""Lists of class names and prompts in files, one-to-one with class numbers.

A file is UTF-8, with or without a byte order mark: one entry a line, or a JSON list (`*.json`).
The number of an entry is its position, so nothing is dropped: an empty entry between others is an
error. Lines end with `\\n`, `\\r\\n` or `\\r`; empty lines after the last entry are ignored.
"""

from collections.abc import Iterable
import json
import os
from pathlib import Path
import re
from typing import Any

_LINE_END = re.compile("\r\n|\n|\r")


def normalise_name(text: str) -> str:
  """Return a name as class lists and labels are compared: without line breaks and outer spaces.

  Every run of whitespace, line breaks included, becomes one space. Byte order marks are dropped.
  """
  return " ".join(text.replace("\ufeff", "").split())


def read_list(path: str, kind: str) -> tuple[str, ...]:
  """Read the entries of a file in order, each through `normalise_name`.

  Args:
    path: of the file.
    kind: what else `path` may be, for the error message.

  Returns:
    As many entries as the list has.

  Raises:
    ValueError: there is no such file, it is not UTF-8 or no list of strings, or an entry is empty.
  """
  file = _path(path)
  if not os.path.isfile(file):
    what = "a file, but a folder" if os.path.isdir(file) else "a file"
    shown = path[:4096]  # as long as a path can be
    raise ValueError(f"{shown!r} is neither {kind} nor {what}; give one of them.")
  if file.suffix == ".json":
    value = read_json(path)
    if not isinstance(value, list):
      raise ValueError(f"{path}: expected a JSON list of texts, got {type(value).__name__}.")
    return tuple(_checked(path, value, "entry", first=0))
  lines = _LINE_END.split(_read_text(path))
  while lines and not lines[-1].strip():
    lines.pop()
  return tuple(_checked(path, lines, "line", first=1))


def read_json(path: str) -> Any:
  """Read a JSON file; a name that an object holds twice is an error.

  Args:
    path: of the file.

  Raises:
    ValueError: the file is not UTF-8, not JSON, or repeats a name.
    OSError: the file cannot be read.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
      if name in found:
        raise KeyError(name)
      found[name] = value
    return found

  text = _read_text(path)
  try:
    return json.loads(text, object_pairs_hook=unique)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  except RecursionError:
    raise ValueError(
      f"{path} is nested too deeply; expected a list or an object of lists."
    ) from None
  except KeyError as error:
    raise ValueError(f"{path} holds {error.args[0]!r} twice; give every class one entry.") from None
  except ValueError:  # the only other one of json.loads
    raise ValueError(f"{path} is not JSON: a number of over 4300 digits.") from None


def read_prompts(path: str) -> dict[str, tuple[str, ...]] | None:
  """Read a JSON object {class: [prompt, ...]}.

  Args:
    path: of the file.

  Returns:
    Classes in the order of the file with their prompts; None where the file holds a list instead.

  Raises:
    ValueError: the file has another form, or an empty or repeated name, or an empty prompt.
  """
  content = read_json(path)
  if isinstance(content, list):
    return None
  if not isinstance(content, dict):
    raise ValueError(
      f"{path}: expected an object of class names with lists of prompts, got "
      f"{type(content).__name__}."
    )
  prompts: dict[str, tuple[str, ...]] = {}
  for name, (key, texts) in zip(_checked(path, content, "class", 0), content.items(), strict=True):
    if not isinstance(texts, list) or not texts:
      raise ValueError(f"{path}: class {key!r} has {texts!r}; expected a list of prompts.")
    if name in prompts:
      raise ValueError(f"{path} holds {name!r} twice; give every class one entry.")
    prompts[name] = tuple(_checked(path, texts, f"class {name!r}, prompt", 0))
  return prompts


def _checked(path: str, entries: Iterable[Any], what: str, first: int) -> list[str]:
  """Normalised entries; ValueError with the position of one that is empty or not a string."""
  found = []
  for number, entry in enumerate(entries, first):
    if not isinstance(entry, str):
      raise ValueError(
        f"{path}, {what} {number}: expected a text in quotes, got {type(entry).__name__}."
      )
    if any("\ud800" <= character <= "\udfff" for character in entry):
      raise ValueError(
        f"{path}, {what} {number}: {entry!r:.80} has half of a surrogate pair; write the character "
        "itself."
      )
    if not (name := normalise_name(entry)):
      raise ValueError(
        f"{path}, {what} {number} is empty, but the position of an entry is its number; write a "
        f"name there, or remove it if no class has this number."
      )
    found.append(name)
  return found


def _path(path: str) -> Path:
  """Return the path with `~` expanded; that of an unknown user as it is."""
  return Path(os.path.expanduser(path))


def _read_text(path: str) -> str:
  data = _path(path).read_bytes()
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = len(_LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
    raise ValueError(
      f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as "
      "UTF-8."
    ) from error
