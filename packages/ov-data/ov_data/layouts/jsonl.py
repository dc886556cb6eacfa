"""The layout `jsonl`: captions.jsonl and labels.jsonl, one JSON object per line.

{"file": "images/a.jpg", "captions": ["...", ...]}
{"file": "images/a.jpg", "label": "dress"}
"""

import posixpath

from ov_data import fs, links
from ov_data.layouts import text_rules
from ov_data.layouts.items import (
  Blob,
  Collection,
  Item,
  Listing,
  Notes,
  clean_captions,
  name_problem,
  open_list,
)
from ov_data.layouts.tree import is_image, is_unsupported_image, join_names
from ov_data.record_source import Skip

LISTS = ("captions.jsonl", "labels.jsonl")
UNNAMED = "image that no line names"


def read(collection: Collection) -> Listing:
  """List the images of the lines and merge lines of the same image.

  For a folder, both lists are read, and images that no line names are skips.

  Raises:
    ValueError: if a line is malformed (the message has file and line), or there is no list.
    OSError: if a list cannot be read.
  """
  is_folder = fs.is_dir(collection.path)
  paths = [collection.path]
  if is_folder:
    top = fs.listdir(collection.path)
    paths = [fs.join(collection.path, name) for name in LISTS if name in top]
    if not paths:
      raise ValueError(f"{collection.path}: contains neither of {', '.join(LISTS)}.")
    for name in () if collection.follow_links else LISTS:
      links.check_list(collection.path, name)
  root = collection.images or parent(paths[0])
  rows = MergedRows("lines merged with an earlier one of the same file")
  for path in paths:
    for where, row in text_rules.json_lines(open_list(path), path):
      file = row.get("file")
      if not isinstance(file, str) or not file:
        hint = "; for file_name use format imagefolder" if "file_name" in row else ""
        raise ValueError(
          f'{where}: expected "file": "name of an image", found {text_rules.short(file)}{hint}.'
        )
      if not row.keys() & {"captions", "caption", "label"}:
        raise ValueError(
          f'{where}: expected "captions" or "label", found '
          f"{text_rules.printable(', '.join(sorted(row)))[:80]}."
        )
      captions = text_rules.listed_captions(row, ("captions", "caption"), where)
      rows.add(file, captions, text_rules.listed_label(row, where), where)
  items, skips = rows.items(root)
  if is_folder:
    skips += unlisted_images(
      collection
      if not collection.images
      else Collection(root, follow_links=collection.follow_links),
      rows.files,
    )
  return Listing("jsonl", items, skips, rows.notes)


def parent(path: str) -> str:
  """Return the folder of a file."""
  return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


class MergedRows:
  """Captions and label of each file of a list, merged from all lines.

  Args:
    merged: note on merged lines of the same file.
  """

  def __init__(self, merged: str):
    self.notes = Notes()
    self.files: set[str] = set()  # normalized names
    self._merged = merged
    self._names: dict[str, str] = {}  # normalized name -> first spelling
    self._captions: dict[str, list[str]] = {}
    self._labels: dict[str, str] = {}
    self._splits: dict[str, str] = {}

  def add(
    self, file: str, captions: list[str], label: str | None, where: str, split: str = ""
  ) -> None:
    """Add a line.

    Raises:
      ValueError: if the file has a different label already; the message begins with `where`.
    """
    name = posixpath.normpath(file)
    label = None if label is None else text_rules.label_text(label)
    if name in self._names:
      self.notes.add(self._merged, where)
    self.files.add(name)
    self._names.setdefault(name, file)
    self._splits.setdefault(name, split)
    self._captions.setdefault(name, []).extend(captions)
    if label is not None and self._labels.setdefault(name, label) != label:
      raise ValueError(
        f"{where}: {text_rules.printable(file)} has label {label!r}, but "
        f"{self._labels[name]!r} in an earlier line; give each image one label."
      )

  def items(self, root: str) -> tuple[list[Item], list[Skip]]:
    """Return an item for each file in `root`, and skips for invalid ones."""
    items, skips = [], []
    for name, file in self._names.items():
      problem = name_problem(file)
      if problem:
        skips.append(Skip(file, problem))
        continue
      label = self._labels.get(name)
      try:
        captions = clean_captions(self._captions[name], file, self.notes)
        label = None if label is None else text_rules.checked_label(label)
      except text_rules.TextError as error:
        if error.reason != "empty label" or not captions:
          skips.append(Skip(file, error.reason, error.detail))
          continue
        self.notes.add("empty labels next to captions", file)
        label = None
      items.append(Item(file, Blob(root, file), captions, label, self._splits[name]))
    return items, skips


def unlisted_images(collection: Collection, files: set[str]) -> list[Skip]:
  """Return the images of a folder that are not among `files`."""
  outside = [
    Skip(name, links.POINTS_OUTSIDE, links.describe(name, target))
    for name, target in collection.tree.outside.items()
    if not any(file.startswith(f"{name}/") for file in files)  # counted per file
  ]
  return outside + [
    Skip(file, UNNAMED)
    for folder, name in collection.tree.files()
    if (is_image(name) or is_unsupported_image(name))
    and (file := join_names(folder, name)) not in files
  ]
