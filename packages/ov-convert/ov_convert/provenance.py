"""Licence, name and citation of an imported model, from the files of its folder."""

import json
import os
import pathlib
import re

from ov_convert import reading

_MAX_BYTES = 1 << 20
_MAX_CITATION = 8000
# Values of the header of a model card, one per line: `license: apache-2.0`.
_HEADER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_VALUE = re.compile(r"^(license|license_name|license_link)[ \t]*:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_BIBTEX = re.compile(
  r"^```+[ \t]*(?:bibtex|latex|tex|text)?[ \t]*\n(\s*@\w+\{.*?)^```", re.MULTILINE | re.DOTALL
)
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def read(folder: str | os.PathLike[str]) -> dict[str, str]:
  """Return what a folder states about its origin.

  Args:
    folder: folder of a model of any library.

  Returns:
    Those of these that are known: "license" (an identifier, or the first line of a LICENSE file),
    "license_link", "name" (in config.json, or the first heading of README.md), "citation" (BibTeX).
  """
  root, found = pathlib.Path(folder), dict[str, str]()
  page = _text(root, "README.md")
  if header := _HEADER.match(page):
    found |= {key: value.strip("\"'") for key, value in _VALUE.findall(header[1])}
    page = page[header.end() :]
  if found.get("license") in (None, "other") and "license_name" in found:
    found["license"] = found["license_name"]
  found.pop("license_name", None)
  if "license" not in found:
    for name in _LICENSE_FILES:
      if lines := _text(root, name).strip().splitlines():
        found["license"] = lines[0].lstrip("# ").strip()[:100]
        break
  if name := _stated_name(root) or _heading(page):
    found["name"] = name[:100]
  if bibtex := _BIBTEX.search(page):
    found["citation"] = bibtex[1].strip()[:_MAX_CITATION]
  return found


def _stated_name(root: pathlib.Path) -> str:
  """Return the name in config.json, unless it is a local path."""
  try:
    content = json.loads(_text(root, "config.json") or "{}")
  except (ValueError, RecursionError):
    return ""  # reported by the reader of the format
  name = content.get("_name_or_path") if isinstance(content, dict) else None
  is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
  return name if is_name and isinstance(name, str) and not name.startswith(".") else ""


def _heading(page: str) -> str:
  line = next((line for line in page.splitlines() if line.startswith("# ")), "")
  return line.removeprefix("# ").strip()


def _text(root: pathlib.Path, name: str) -> str:
  """Return the text of a file; "" if it is missing, too large, or a link out of the folder."""
  try:
    file = reading.inside(root, name)
  except (OSError, ValueError):
    return ""
  if file.stat().st_size > _MAX_BYTES:
    return ""
  return file.read_text("utf-8", errors="replace")
