"""Validated parsing of tokenizer.json and vocabulary files.

The `tokenizers` library uses time and memory proportional to the largest id, raises bare
exceptions, and panics on some files. Sizes, types and ids are therefore validated first.
"""

import codecs
import json
from typing import Any

import tokenizers

MAX_BYTES = 64 << 20
MAX_TOKENS = 10_000_000  # exclusive upper bound of ids
_PROBES = ("a photo, 3.5", "Ünïcödé 東京 \U0001f600 สวัสดี")


def parse(data: bytes, path: object) -> tokenizers.Tokenizer:
  """Return the tokenizer of a tokenizer.json.

  Args:
    data: content of the file.
    path: path of the file, for messages.

  Raises:
    ValueError: if the content is malformed, has ids out of range, or cannot encode a text.
  """
  data = data.removeprefix(codecs.BOM_UTF8)
  try:
    _check(load_object(data))
    backend = tokenizers.Tokenizer.from_buffer(data)
    for text in _PROBES:  # fails if the unknown token is missing
      backend.encode(text, add_special_tokens=False)
  except BaseException as error:  # the library raises bare Exception and panics
    if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
      raise
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} is not a tokenizer.json: {reason}") from None
  return backend


def parse_lines(data: bytes, path: object) -> dict[str, int]:
  """Return the tokens of a vocabulary file, one per line, with their ids.

  Raises:
    ValueError: if the file is not UTF-8, has empty or repeated lines, or too many lines.
  """
  data = data.removeprefix(codecs.BOM_UTF8)
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    number = data.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"vocabulary {path}, line {number}: byte 0x{data[error.start]:02x} is not UTF-8; save the "
      "file as UTF-8."
    ) from None
  vocabulary: dict[str, int] = {}
  for i, line in enumerate(text.rstrip("\r\n").split("\n")):
    token = line.removesuffix("\r")
    if not token:
      raise ValueError(f"vocabulary {path}, line {i + 1}: empty; every line must be a token.")
    if token in vocabulary:
      first = vocabulary[token] + 1
      raise ValueError(f"vocabulary {path}, line {i + 1}: {token!r} is also on line {first}.")
    if i == MAX_TOKENS:
      raise ValueError(f"vocabulary {path}: more than {MAX_TOKENS:,} lines.")
    vocabulary[token] = i
  return vocabulary


def load_object(data: bytes) -> dict[str, Any]:
  """Return the JSON object of a file; raise ValueError if it does not contain one."""
  try:
    content = json.loads(data.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ValueError(f"byte {error.start} is not UTF-8") from None
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  if not isinstance(content, dict):
    raise ValueError(f"expected a JSON object, got {type(content).__name__}")
  return content


def _check(content: dict[str, Any]) -> None:
  """Raise ValueError for a vocabulary that the library cannot handle."""
  model = content.get("model")
  if not isinstance(model, dict):
    raise ValueError(f"expected an object under 'model', got {type(model).__name__}")
  vocabulary = model.get("vocab")
  if isinstance(vocabulary, dict):
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
      _check_id(token, number)
      if number in tokens:
        raise ValueError(
          f"{tokens[number][:40]!r} and {token[:40]!r} both have id {number}; expected one"
        )
      tokens[number] = token
  elif isinstance(vocabulary, list):  # Unigram: the position is the id
    if len(vocabulary) > MAX_TOKENS:
      raise ValueError(f"{len(vocabulary)} tokens; expected at most {MAX_TOKENS:,}")
  else:
    raise ValueError(f"expected an object or a list under 'vocab', got {_kind(vocabulary)}")
  added = content.get("added_tokens")
  if added is not None and not isinstance(added, list):
    raise ValueError(f"expected a list under 'added_tokens', got {_kind(added)}")
  for entry in added or ():
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
      raise ValueError("an entry of 'added_tokens' is not an object with a text under 'content'")
    _check_id(entry["content"], entry.get("id"))


def _check_id(token: str, number: object) -> None:
  if type(number) is not int:
    raise ValueError(f"the id of {token[:40]!r} is of type {_kind(number)}; expected a number")
  if not 0 <= number < MAX_TOKENS:
    shown = number if abs(number) < 10**18 else "a number with more than 18 digits"
    raise ValueError(f"the id of {token[:40]!r} is {shown}; expected 0 to {MAX_TOKENS - 1:,}")


def _kind(value: object) -> str:
  return type(value).__name__
