"""A small package in the format of @iconify/json, for tests."""

import io
import json
from pathlib import Path
import tarfile
from typing import Any

MIT = {"title": "MIT", "spdx": "MIT", "url": "https://example.com/mit"}
_SHAPES = {
  "square": "M4 4h16v16H4z",
  "triangle": "M12 3l9 18H3z",
  "bar": "M10 2h4v20h-4z",
  "corner": "M3 3h18v5H8v13H3z",
  "arrow-up": "M12 2l8 10h-5v10H9V12H4z",
}


def icon_set(
  prefix: str, icons: dict[str, Any], license: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
  """Return the JSON of a set; values of `icons` are bodies or icons."""
  info = {
    "name": prefix.title(),
    "author": {"name": "A | B", "url": "u"},
    "license": license or MIT,
  }
  bodies = {name: {"body": b} if isinstance(b, str) else b for name, b in icons.items()}
  return {"prefix": prefix, "info": info, "icons": bodies, "width": 24, "height": 24, **more}


def path(shape: str, transform: str = "") -> str:
  """Return the body of an icon."""
  return f'<path fill="currentColor" transform="{transform}" d="{_SHAPES[shape]}"/>'


def package() -> dict[str, dict[str, Any]]:
  """Return two training sets, two held-out sets, and sets that are left out."""
  half = "translate(4 4) scale(.5)"
  lines = {f"{shape}-outline": path(shape) for shape in _SHAPES}
  hostile = {
    "external": '<image href="http://127.0.0.1:9/a.png"/>',
    "entity": '<!DOCTYPE a [<!ENTITY b "c">]><path d="&b;"/>',
    "recursion": '<g id="a"><use href="#a"/></g>',
    "huge-icon": {"body": path("bar"), "width": 1e300},
    "wide-icon": {"body": path("bar"), "width": 240},
    "many": '<path d="M0 0z"/>' * 6000,
    "empty-icon": "<g/>",
    "spinning": '<path d="M0 0h9v9z"><animate attributeName="d"/></path>',
    "old-icon": {"body": path("bar"), "hidden": True},
    "24": path("bar"),
  }
  return {
    "one": icon_set(
      "one",
      {**lines, "corner-16-outline": path("corner")},
      suffixes={"outline": "Outline", "16-outline": "Outline, 16 px"},
      aliases={
        "box-outline": {"parent": "square-outline"},
        "lower-box": {"parent": "square-outline", "vFlip": True},
      },
    ),
    "two": icon_set(
      "two", {"bar": path("bar", "rotate(30 12 12)"), "home": path("arrow-up")} | hostile
    ),
    "held": icon_set(
      "held",
      {
        "square": path("square", half),  # a smaller copy of one:square-outline
        "bar": path("bar", "rotate(55 12 12)"),
        "home": path("triangle", "rotate(33 12 12)"),
        "unseen": path("corner", "rotate(45 12 12)"),
      },
    ),
    "other": icon_set("other", {"bar": path("bar", "rotate(80 12 12)")}),
    "closed": icon_set("closed", {"bar": path("bar")}, {"title": "All rights reserved"}),
    "token": icon_set("token", {"abc": path("bar")}),
  }


def write_folder(folder: Path, sets: dict[str, dict[str, Any]]) -> Path:
  """Write a package as a folder."""
  (folder / "json").mkdir(parents=True)
  (folder / "package.json").write_text('{"version": "9.9.9"}')
  for name, content in sets.items():
    (folder / "json" / f"{name}.json").write_text(json.dumps(content))
  return folder


def write_archive(file: Path, sets: dict[str, dict[str, Any]], *more: tarfile.TarInfo) -> Path:
  """Write a package as npm does, with further members."""
  contents = {f"package/json/{name}.json": json.dumps(content) for name, content in sets.items()}
  with tarfile.open(file, "w:gz") as tar:
    for name, text in {"package/package.json": '{"version": "9.9.9"}', **contents}.items():
      header = tarfile.TarInfo(name)
      header.size = len(text)
      tar.addfile(header, io.BytesIO(text.encode()))
    for header in more:
      tar.addfile(header)
  return file
