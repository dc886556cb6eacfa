"""Reading lists of class names and prompts from files.

A file is UTF-8, with or without a byte order mark: one entry per line, or a JSON list (`*.json`).
The position of an entry is its class number, so no entry is skipped: an empty entry between others
is an error. Lines end with `\\n`, `\\r\\n` or `\\r`; empty lines at the end are ignored.
"""

from collections.abc import Iterable
import json
import os
from pathlib import Path
import re
from typing import Any

_LINE_END = re.compile("\r\n|\n|\r")


def normalise_name(text: str) -> str:
  """Return the normal form of a name, in which class lists and labels are compared.

  Every run of whitespace, including line breaks, becomes one space. Outer whitespace and byte order
  marks are removed.
  """
  return " ".join(text.replace("\ufeff", "").split())


def read_list(path: str, kind: str) -> tuple[str, ...]:
  """Read the entries of a file in order, normalised by `normalise_name`.

  Args:
    path: path of the file.
    kind: what else the user may pass as `path`, for the error message.

  Raises:
    ValueError: if the file does not exist, is not UTF-8 or not a list of strings, or an entry is
      empty.
  """
  file = _path(path)
  if not os.path.isfile(file):
    what = "a file, but a directory" if os.path.isdir(file) else "a file"
    shown = path[:4096]  # maximum length of a path
    raise ValueError(f"{shown!r} is neither {kind} nor {what}; pass one of these.")
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
  """Read a JSON file; duplicate keys are an error.

  Args:
    path: path of the file.

  Raises:
    ValueError: if the file is not UTF-8 or not JSON, or an object has duplicate keys.
    OSError: if the file cannot be read.
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
    raise ValueError(f"{path} holds {error.args[0]!r} twice; use one entry per class.") from None
  except ValueError:  # json.loads raises no other ValueError
    raise ValueError(f"{path} is not JSON: a number has more than 4300 digits.") from None


def read_prompts(path: str) -> dict[str, tuple[str, ...]] | None:
  """Read a JSON object {class: [prompt, ...]}.

  Args:
    path: path of the file.

  Returns:
    The prompts of each class, in the order of the file; None if the file holds a list instead.

  Raises:
    ValueError: if the file is malformed, a name is empty or repeated, or a prompt is empty.
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
      raise ValueError(f"{path} holds {name!r} twice; use one entry per class.")
    prompts[name] = tuple(_checked(path, texts, f"class {name!r}, prompt", 0))
  return prompts


def _checked(path: str, entries: Iterable[Any], what: str, first: int) -> list[str]:
  """Return normalised entries; raise ValueError for an entry that is empty or not a string."""
  found = []
  for number, entry in enumerate(entries, first):
    if not isinstance(entry, str):
      raise ValueError(
        f"{path}, {what} {number}: expected a text in quotes, got {type(entry).__name__}."
      )
    if any("\ud800" <= character <= "\udfff" for character in entry):
      raise ValueError(
        f"{path}, {what} {number}: {entry!r:.80} has an unpaired surrogate; write the character "
        "itself."
      )
    if not (name := normalise_name(entry)):
      raise ValueError(
        f"{path}, {what} {number} is empty, but the position of an entry is its class number; add "
        f"a name, or remove the entry if no class has this number."
      )
    found.append(name)
  return found


def _path(path: str) -> Path:
  """Return the path with `~` expanded; `~user` of an unknown user is left unchanged."""
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
