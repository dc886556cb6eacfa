"""Conversion of config values and data to safe text for published Markdown.

`clean` removes secrets and local paths, `cell` escapes Markdown and HTML.
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
_PLACE = re.compile(  # a URL, or a path with a root, ~ or ./
  r"""(?:(?<=[\s,;:="'(\[])|^)(?:[A-Za-z][\w+.-]+://|~|\.{0,2}/|[A-Za-z]:\\)[^\s,;"')\]]*"""
)
_PLACE_KEY = re.compile(r"(^|_)(dir|path|root|file|folder|classes|checkpoint)$")


def cell(value: Any) -> str:
  """Return a value as text for one table cell, without markup and line breaks."""
  text = value if isinstance(value, str) else report_text.plain(value)
  text = "".join(c if c.isprintable() else " " for c in text)
  for mark, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
    text = text.replace(mark, shown)
  text = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text).strip()
  # Escape headings, lists and rules at the beginning of a line.
  return re.sub(r"^(\d*)(#|=|[-+.)](?=\s|$)|-(?=--))", r"\1\\\2", text)


def clean(value: Any, key: str = "") -> Any:
  """Return JSON values without secrets; paths and URLs are reduced to their last component."""
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
  is_path = _PLACE.match(value) and not re.search(r"[,;]", value)  # may contain spaces
  if is_path or _PLACE_KEY.search(key):
    return _last(value)
  return _PLACE.sub(lambda match: _last(match[0]), value)


def _last(place: str) -> str:
  return re.split(r"[/\\]", place.rstrip("/\\"))[-1]
