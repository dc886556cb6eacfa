"""Values of configs and data as text for a page of Markdown that leaves the machine.

`clean` takes out what others must not learn, `cell` what Markdown would take for more than text.
"""

from collections.abc import Mapping
import re
from typing import Any

from apps.trainer import report_text

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(
  r"(^|_)(token|auth_tokens?|secrets?|passw(or)?d|passphrase|credentials?|authorization|"
  r"(api|access|private|secret|auth|wandb|client)_?key)$"
)
_SECRET_VALUE = re.compile(
  r"hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w+|AKIA[0-9A-Z]{12,}|-----BEGIN|"
  r"eyJ[\w-]{10,}\.[\w-]+\.|\b[0-9a-f]{40}\b"
)
_PLACE = re.compile(  # a URL, or a path that says where it begins
  r"""(?:(?<=[\s,;:="'(\[])|^)(?:[A-Za-z][\w+.-]+://|~|\.{0,2}/|[A-Za-z]:\\)[^\s,;"')\]]*"""
)
_PLACE_KEY = re.compile(r"(^|_)(dir|path|root|file|folder|classes|checkpoint)$")


def cell(value: Any) -> str:
  """Any value as text that stays in one cell of a table: no markup, no line breaks."""
  text = value if isinstance(value, str) else report_text.plain(value)
  text = "".join(c if c.isprintable() else " " for c in text)
  for mark, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
    text = text.replace(mark, shown)
  text = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text).strip()
  # What would be a heading, a list or a rule at the beginning of a line.
  return re.sub(r"^(\d*)(#|=|[-+.)](?=\s|$)|-(?=--))", r"\1\\\2", text)


def clean(value: Any, key: str = "") -> Any:
  """JSON values without secrets, and with the last name alone of whatever is a place."""
  if value and _SECRET_KEY.search(re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", key).lower()):
    return HIDDEN
  if isinstance(value, Mapping):
    return {str(name): clean(child, str(name)) for name, child in value.items()}
  if isinstance(value, list | tuple):
    return [clean(child, key) for child in value]
  if not isinstance(value, str):
    return value
  if _SECRET_VALUE.search(value):
    return HIDDEN
  whole = _PLACE.match(value) and not re.search(r"[,;]", value)  # blanks are part of it then
  if whole or _PLACE_KEY.search(key):
    return _last(value)
  return _PLACE.sub(lambda match: _last(match[0]), value)


def _last(place: str) -> str:
  return re.split(r"[/\\]", place.rstrip("/\\"))[-1]
