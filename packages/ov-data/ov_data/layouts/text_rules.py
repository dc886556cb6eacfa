"""Validation and repair of external text: names, captions, labels, JSON.

File names keep all bytes: invalid UTF-8 is decoded with `surrogateescape` and escaped in messages.
Captions are repaired: invalid bytes, lone surrogates and NUL characters become U+FFFD. Labels are
one line: runs of white space become one space, and invalid bytes are escaped.
"""

from collections.abc import Iterable, Iterator
import json
import re
from typing import Any

MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_BYTES = 16 << 20  # maximum size of a JSON file of one image, or of a line
_MAX_LABEL_BYTES = 1000

_BYTE_ORDER_MARK = "\ufeff"
_UTF_8_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Including line breaks and bidirectional controls.
_UNPRINTABLE = re.compile(
  "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_KEYS_READ = frozenset(("file", "file_name", "text", "caption", "captions", "label"))


class TextError(ValueError):
  """An unusable caption or label; `reason` is a short phrase for counting."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason = reason
    self.detail = detail


def decode(data: bytes) -> str:
  """Decode a text file without its byte order mark; invalid bytes become surrogates."""
  if data[:2] in _UTF_16_MARKS:
    return data.decode("utf-16", "replace")
  return data.decode("utf-8", "surrogateescape").removeprefix(_BYTE_ORDER_MARK)


def repaired_bytes(text: str) -> str:
  """Return the text with U+FFFD for surrogate-escaped bytes."""
  return _ESCAPED_BYTES.sub(
    lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), text
  )


def repaired(text: str) -> str:
  """Return the text with U+FFFD for invalid bytes, lone surrogates and NUL characters."""
  return _SURROGATE.sub("\ufffd", repaired_bytes(text)).replace("\0", "\ufffd")


def label_text(text: str) -> str:
  r"""Return a label as one line: collapse white space, escape surrogates such as "\xe9"."""
  text = " ".join(text.replace(_BYTE_ORDER_MARK, "").split())
  return _CONTROL.sub(lambda found: _escaped(found[0]), text)


def checked_label(value: str | int) -> str:
  """Return a label as one line.

  Raises:
    TextError: if the label is empty or too long.
  """
  label = label_text(str(value))
  if not label:
    raise TextError("empty label")
  if len(label.encode()) > _MAX_LABEL_BYTES:
    raise TextError("label too long", f"{len(label.encode())} bytes, at most {_MAX_LABEL_BYTES}")
  return label


def printable(text: str) -> str:
  r"""Return the text for a report: escape unprintable characters, such as "\xe9" and "\n"."""
  return _UNPRINTABLE.sub(lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
  code = ord(character)
  if 0xDC80 <= code <= 0xDCFF:  # surrogate-escaped byte
    return f"\\x{code - 0xDC00:02x}"
  return character.encode("unicode_escape").decode()


def parse_json(data: bytes, where: str) -> Any:
  """Parse JSON in UTF-8, with or without byte order mark; invalid bytes become surrogates.

  Args:
    data: encoded text.
    where: file (and line) for the message.

  Raises:
    ValueError: if the text is not JSON or repeats a relevant key; the message begins with `where`.
  """
  if data[:2] in _UTF_16_MARKS:
    raise ValueError(f"{where}: encoded as UTF-16; save it as UTF-8.")
  try:
    return json.loads(decode(data), object_pairs_hook=_unique)
  except RecursionError:
    raise ValueError(f"{where}: not usable JSON (nested too deeply).") from None
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON ({_explain(data, error)}") from None
  except KeyError as error:
    raise ValueError(f'{where}: has "{error.args[0]}" twice; merge the values.') from None
  except ValueError:  # an integer with too many digits
    raise ValueError(f"{where}: not JSON (a number with more than 4300 digits).") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Return the object; raise KeyError for a repeated relevant key."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    for name in _KEYS_READ & found.keys():
      if names.count(name) > 1:
        raise KeyError(name)
  return found


def _explain(data: bytes, error: json.JSONDecodeError) -> str:
  """Return the explanation of an error and the remedy, with a closing parenthesis in between."""
  if not error.pos:
    return f"begins with {data[:20]!r}); is it another file format?"
  where = f"{error.msg} at character {error.pos + 1})"
  if error.msg == "Extra data" or data.lstrip()[:1] == b"[":
    return f"{where}; write one object per line, without commas and brackets."
  return f"{where}; is the file complete?"


def json_lines(lines: Iterable[bytes], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield ("file, line n", object) for every line that is not empty.

  Raises:
    ValueError: if a line is not a JSON object or too long; the message has file and line.
  """
  for number, line in enumerate(lines, 1):
    where = f"{path}, line {number}"
    if not line.removeprefix(_UTF_8_MARK).strip():
      continue
    if len(line) > MAX_JSON_BYTES:
      raise ValueError(f"{where}: {len(line):,} bytes; expected at most {MAX_JSON_BYTES:,} a line.")
    row = parse_json(line, where)
    if not isinstance(row, dict):
      raise ValueError(f"{where}: expected a JSON object, found {short(row)}.")
    yield where, row


def short(value: object, length: int = 60) -> str:
  """Return the truncated repr of a value for a message."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # nested too deeply; an integer with thousands of digits
    text = f"a {type(value).__name__}"
  return printable(text if len(text) <= length else text[:length] + "...")


def listed_captions(row: dict[str, Any], keys: Iterable[str], where: str) -> list[str]:
  """Return the captions under several keys of a JSON object; null is ignored.

  Raises:
    ValueError: if a value is neither a string nor a list of strings; begins with `where`.
  """
  captions: list[str] = []
  for key in keys:
    value = row.get(key)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
      raise ValueError(f'{where}: expected "{key}": "text" or ["text", ...], found {short(value)}.')
    captions += values
  return captions


def listed_label(row: dict[str, Any], where: str) -> str | None:
  """Return the unmodified label of a JSON object as a string; None without a label.

  Raises:
    ValueError: if the label is neither a string nor an integer; begins with `where`.
  """
  label = row.get("label")
  if label is None or isinstance(label, str):
    return label
  if isinstance(label, bool) or not isinstance(label, int):
    raise ValueError(f'{where}: expected "label": "name" or an integer, found {short(label)}.')
  return str(label)
