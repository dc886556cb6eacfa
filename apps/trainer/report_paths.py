"""Relative paths in a report, so that a shared page reveals no user or machine."""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any


def relative(value: Any, workdir: Path) -> Any:
  """Replace absolute paths in a nested value.

  Args:
    value: str, mapping, list or tuple, possibly nested; other values are returned unchanged.
    workdir: workdir of the report.

  Returns:
    The value with paths relative to the workdir, such as `data` or `../shards`. Paths in the home
    directory start with ~ if the workdir is outside of it. Keys of mappings are converted too.
  """
  if isinstance(value, str):
    return _text(value, os.path.abspath(workdir), os.path.expanduser("~"))
  if isinstance(value, Mapping):
    return {relative(key, workdir): relative(item, workdir) for key, item in value.items()}
  if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple
    return type(value)(*(relative(item, workdir) for item in value))
  if isinstance(value, list | tuple):
    return type(value)(relative(item, workdir) for item in value)
  return value


def _text(text: str, workdir: str, home: str) -> str:
  if os.path.isabs(text):
    if _inside(text, home) and not _inside(workdir, home):
      return os.path.join("~", os.path.relpath(text, home)) if text.rstrip("/") != home else "~"
    return os.path.relpath(text, workdir)
  for folder, name in ((workdir, "."), (os.path.dirname(workdir), ".."), (home, "~")):
    if len(folder) > 1:
      text = text.replace(folder + "/", name + "/")
  return text


def _inside(path: str, folder: str) -> bool:
  return len(folder) > 1 and os.path.commonpath([os.path.normpath(path), folder]) == folder
