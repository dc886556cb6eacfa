"""The layout `imagefolder` of Hugging Face datasets: images with a metadata file in their folder.

photos/train/metadata.jsonl    {"file_name": "1.png", "text": "a red car"}
photos/train/1.png

metadata.csv has the same columns. Folders named like splits are splits.
"""

from collections.abc import Iterator
import csv
import posixpath
from typing import Any

from ov_data import fs, links
from ov_data.layouts import text_rules
from ov_data.layouts.items import Collection, Listing, open_list
from ov_data.layouts.jsonl import MergedRows, parent, unlisted_images
from ov_data.layouts.tree import SPLIT, join_names

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_CAPTIONS = ("text", "caption", "captions")


def read(collection: Collection) -> Listing:
  """List the images named in the metadata files of the root and all its subfolders.

  Raises:
    ValueError: if a metadata file is malformed or of an unsupported type, or there is none.
    OSError: if a file cannot be read.
  """
  if not fs.is_dir(collection.path):  # a metadata file
    collection = Collection(parent(collection.path), follow_links=collection.follow_links)
  found = [(folder, name) for folder, name in collection.tree.files() if name in METADATA]
  if not found:
    raise ValueError(
      f"{collection.path}: found no metadata.jsonl or metadata.csv; expected one with a column "
      "file_name."
    )
  rows = MergedRows("lines merged with an earlier one of the same file")
  for folder, name in found:
    path = fs.join(collection.path, join_names(folder, name))
    if not collection.follow_links:
      links.check_list(collection.path, join_names(folder, name))
    if name.endswith(".parquet"):
      raise ValueError(
        f"{path}: Parquet is not supported; convert it to metadata.jsonl, for example with "
        "pandas.read_parquet(path).to_json('metadata.jsonl', orient='records', lines=True)."
      )
    lines = _csv_rows(path) if name.endswith(".csv") else None
    for where, row in lines or text_rules.json_lines(open_list(path), path):
      file = row.get("file_name")
      if not isinstance(file, str) or not file:
        raise ValueError(
          f'{where}: expected "file_name": "name of an image", found {text_rules.short(file)}.'
        )
      if not row.keys() & {*_CAPTIONS, "label"}:
        raise ValueError(
          f"{where}: expected one of {', '.join(_CAPTIONS)}, label; found "
          f"{text_rules.printable(', '.join(sorted(row)))[:80]}."
        )
      captions = text_rules.listed_captions(row, _CAPTIONS, where)
      name_in_root = join_names(folder, posixpath.normpath(file))
      if file.startswith("/") or posixpath.normpath(file).startswith(".."):
        name_in_root = file  # `MergedRows` rejects it
      rows.add(name_in_root, captions, text_rules.listed_label(row, where), where,
               _split(name_in_root))  # fmt: skip
  items, skips = rows.items(collection.path)
  return Listing("imagefolder", items, skips + unlisted_images(collection, rows.files), rows.notes)


def _split(name: str) -> str:
  """Return the first folder of the path if it is named like a split, else ""."""
  top, _, below = name.partition("/")
  return top if below and SPLIT.fullmatch(top.lower()) else ""


def _csv_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield ("file, line n", row by column) of a CSV file, without empty fields.

  Raises:
    ValueError: if the header lacks file_name, or a row has a different number of fields.
  """
  # surrogateescape preserves file names that are not valid UTF-8.
  lines = (line.decode("utf-8", "surrogateescape") for line in open_list(path))
  csv.field_size_limit(text_rules.MAX_JSON_BYTES)  # longer captions are counted later
  reader = csv.reader(_without_mark(lines), strict=True)
  try:
    header = [column.strip() for column in next(filter(None, reader), [])]
    if "file_name" not in header or len(set(header)) < len(header):
      separated = ", separated by commas" if len(header) == 1 else ""
      raise ValueError(
        f"{path}, line {max(reader.line_num, 1)}: expected a header with file_name and each column "
        f"once{separated}, found {text_rules.short(', '.join(header), 80)}."
      )
    for values in reader:
      where = f"{path}, line {reader.line_num}"
      if not values:
        continue
      if len(values) != len(header):
        raise ValueError(f"{where}: {len(values)} fields; the header has {len(header)}.")
      yield where, {key: value or None for key, value in zip(header, values)}
  except csv.Error as error:
    what = str(error).partition(" - ")[0]  # without the hint for Python programmers
    raise ValueError(
      f"{path}, line {reader.line_num}: not CSV ({what}); expected lines that end with a line "
      'feed, and a field with quotes, commas or line breaks as "a ""big"" dog".'
    ) from None


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
  for number, line in enumerate(lines):
    yield line.removeprefix("\ufeff") if number == 0 else line
